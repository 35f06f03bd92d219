"""The report as one HTML file that loads nothing: plain values prepared here, put into Jinja templates."""
