"""One HTML file about one or several runs."""
