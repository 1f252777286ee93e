"""The data format (``schema``), the embedded digits set and the scripts that prepare data sets. See README.md here."""
