"""Where this copy of the package stands: in torch.ops, and where its compiled module is. A build
with another name for either has another file here, so that two copies fit into one process.
"""

NAMESPACE = "lion_kernels"
MODULE = "._C"  # relative to the package
