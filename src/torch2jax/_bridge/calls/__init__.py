"""From a Python call to the operands of the primitive, and back."""
