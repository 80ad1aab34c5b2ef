"""The review page: people see a candidate's evidence in the browser, and approve or reject it."""
