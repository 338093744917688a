//! End-to-end tests: helpers to run the `strata` binary as an ordinary user would.
