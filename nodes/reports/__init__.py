"""The nodes that show what runs did: reports, comparisons, plots and grids, and what draws them."""
