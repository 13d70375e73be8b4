"""The nodes that show reports, comparisons, plots and grids of sampling runs, and the code that draws them."""
