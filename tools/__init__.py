"""Tools that are run now and then: a benchmark, counting frequent ids."""
