"""The vote: what is voted (poll), who is at the other end (wire), what travels (buffers, exchange),
and the walk through it (election). Knows no optimizer.
"""
