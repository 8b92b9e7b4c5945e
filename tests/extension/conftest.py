"""The distribution is not a test: it is installed by one."""

collect_ignore = ["painn"]
