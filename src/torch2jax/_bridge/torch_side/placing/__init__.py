"""Here large results are computed in the memory of whoever gets them."""
