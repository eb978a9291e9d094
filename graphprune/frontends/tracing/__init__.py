"""From a module to a graph without in-place operators, of operators that have rules."""
