"""What queen and hive share as HTTP servers: routes as data, guards, errors, event streams."""
