"""The capacity dial swept: a grid of cells, each measured once, a table, and the page that shows it."""
