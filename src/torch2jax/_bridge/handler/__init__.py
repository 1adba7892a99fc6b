"""The Python half of the extension: its entries, and calls on platforms without a handler."""
