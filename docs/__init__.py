"""The documentation: pages, and the little code that draws, fills in and joins them."""
