"""Bundle updates: download, trial and replacement of the running agent."""
