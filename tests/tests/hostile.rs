//! A guest can be wrong, never the host: a slice of the campaign `hostile`, always from the same seed.

#[test]
fn hostile_guests_do_the_host_no_harm() {
    if let Err(error) = strata_engine_dbt::check_host() {
        strata_tests::skip(&error.to_string());
        return;
    }
    let cases = strata_tests::slice(env!("CARGO_BIN_EXE_hostile"), 120);
    assert!(cases >= 100, "only {cases} cases");
}
