"""Here is the extension's Python half: its entries, and calls on platforms without a handler."""
