//! Whatever a guest, a file or a client says, nothing panics, hangs or grows: a slice of the campaign `fuzz`, always from
//! the same seed, after the whole corpus.

#[test]
fn no_input_does_harm() {
    let cases = strata_tests::slice(env!("CARGO_BIN_EXE_fuzz"), 15);
    assert!(cases >= 1000, "only {cases} cases");
}
