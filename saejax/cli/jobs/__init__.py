"""One module a job of the command line. A job imports no other job."""
