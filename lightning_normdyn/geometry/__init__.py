"""Where weight vectors lie in memory and across ranks, and how sums over them are taken."""
