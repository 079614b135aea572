"""Tools that are run now and then: a benchmark, preparing data, counting frequent ids."""
