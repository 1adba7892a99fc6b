"""A Python call becomes operands of the primitive, and its results become the user's tree."""
