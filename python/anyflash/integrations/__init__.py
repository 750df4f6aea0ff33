"""Registers anyflash's attention with other packages. Importing it imports none of them."""
