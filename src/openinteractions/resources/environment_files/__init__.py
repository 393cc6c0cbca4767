"""Files of environments: listed, downloaded, uploaded."""
