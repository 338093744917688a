//! Images of one's own: made from `tiny` with packages, run as they are, said to be old when they are, and made anew.

use std::fs;

use strata_tests::{Need, Strata, ready, shared};

#[test]
fn tiny_with_a_package_is_made_again_by_its_name() {
    if !ready(Need::Machine) {
        return;
    }
    let image = |words: &str| Strata::new().args(["image"]).args(words.split(' '));
    let answer = || Strata::new().args(["run", "kit", "--", "jq", "-n", "6*7"]);
    image("build kit --from tiny --package jq").run().expect(0);
    let run = answer().run().expect(0);
    assert_eq!((run.text().as_str(), run.stderr.as_str()), ("42\n", ""));

    // As if another version of Strata had made it.
    let path = shared().root().join("cache/images/kit.json");
    let manifest = shared().manifest("kit");
    let current = manifest["fingerprint"].as_str().expect("it has one");
    let text = fs::read_to_string(&path).expect("it is there");
    fs::remove_file(&path).expect("it is ours");
    fs::write(&path, text.replace(current, "0-old")).expect("it is ours");
    let run = answer().run().expect(0);
    assert_eq!(run.text(), "42\n");
    let advice = "'strata image build kit' makes it anew";
    assert!(run.stderr.contains(advice), "{}", run.stderr);
    let list = image("ls").run().expect(0).text();
    assert!(list.contains("from tiny with jq (out of date)"), "{list}");

    image("build kit").run().expect(0);
    assert_eq!(shared().manifest("kit")["fingerprint"], current);
    let run = answer().run().expect(0);
    assert_eq!((run.text().as_str(), run.stderr.as_str()), ("42\n", ""));
    image("rm kit").run().expect(0);
}
