//! Tests of the cache with images made by hand.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::progress::Quiet;
use crate::workshop::NoWorkshop;

struct Sandbox {
    store: Store,
    _directory: tempfile::TempDir,
}

fn sandbox() -> Sandbox {
    let directory = tempfile::tempdir().unwrap();
    Sandbox {
        store: Store::open(directory.path().join("cache")).unwrap(),
        _directory: directory,
    }
}

fn install(store: &Store, name: &str, kernel: &[u8], initrd: &[u8]) -> Image {
    let made = Made {
        kernel: kernel.to_vec(),
        initrd: initrd.to_vec(),
        kernel_release: "6.1.0".to_owned(),
        packages: vec!["linux_1_amd64".to_owned()],
        command_line: "quiet".to_owned(),
        disk: None,
    };
    let _lock = store.lock(&Quiet).unwrap();
    let work = tempfile::tempdir_in(store.directory("tmp").unwrap()).unwrap();
    let recipe = Recipe::get("tiny").unwrap();
    store
        .install(name, &Order::plain("tiny"), &recipe, made, work.path())
        .unwrap()
}

fn files(store: &Store, directory: &str) -> Vec<String> {
    let entries = fs::read_dir(store.root().join(directory))
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_empty_cache_writes_nothing() {
    let Sandbox { store, .. } = sandbox();
    assert_eq!(store.list().unwrap(), []);
    assert!(matches!(store.get("tiny"), Err(ImageError::NotFound(_))));
    assert!(matches!(store.remove("tiny"), Err(ImageError::NotFound(_))));
    assert!(!store.root().exists());
}

#[test]
fn what_is_installed_is_found_and_removed() {
    let Sandbox { store, .. } = sandbox();
    let image = install(&store, "tiny", b"kernel", b"initrd");
    assert!(image.is_current());
    assert_eq!(fs::read(&image.kernel).unwrap(), b"kernel");
    assert_eq!(fs::read(&image.initrd).unwrap(), b"initrd");
    assert_eq!(image.size(), 12);
    install(&store, "other", b"kernel", b"another");
    assert_eq!(files(&store, "blobs/sha256").len(), 3);
    assert_eq!(
        store
            .list()
            .unwrap()
            .iter()
            .map(|image| image.name.as_str())
            .collect::<Vec<_>>(),
        ["other", "tiny"]
    );

    store.remove("tiny").unwrap();
    assert_eq!(files(&store, "blobs/sha256").len(), 2);
    assert_eq!(
        fs::read(store.get("other").unwrap().kernel).unwrap(),
        b"kernel"
    );
    store.remove("other").unwrap();
    assert_eq!(files(&store, "blobs/sha256"), [""; 0]);
    assert_eq!(files(&store, "verified"), [""; 0]);
}

#[test]
fn a_new_build_replaces_the_old() {
    let Sandbox { store, .. } = sandbox();
    install(&store, "tiny", b"kernel", b"old");
    let image = install(&store, "tiny", b"kernel", b"new");
    assert_eq!(fs::read(image.initrd).unwrap(), b"new");
    assert_eq!(files(&store, "blobs/sha256").len(), 2);
    assert_eq!(files(&store, "tmp"), [""; 0]);
}

#[test]
fn damage_is_seen_even_if_the_size_stays() {
    let Sandbox { store, .. } = sandbox();
    let image = install(&store, "tiny", b"kernel", b"initrd");
    fs::remove_file(&image.initrd).unwrap();
    fs::write(&image.initrd, b"inItrd").unwrap();
    assert!(matches!(
        store.get("tiny"),
        Err(ImageError::Damaged { part: "initrd", .. })
    ));
    fs::write(&image.initrd, b"initrd").unwrap();
    store.get("tiny").unwrap();
    fs::remove_file(&image.kernel).unwrap();
    assert!(matches!(
        store.get("tiny"),
        Err(ImageError::Damaged { part: "kernel", .. })
    ));
}

#[test]
fn what_dead_builds_left_goes_with_the_next() {
    let Sandbox { store, .. } = sandbox();
    let left = store.root().join("tmp/.tmpAbCdEf");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("half"), b"half a kernel").unwrap();
    install(&store, "tiny", b"kernel", b"initrd");
    assert_eq!(files(&store, "tmp"), [""; 0]);
}

#[test]
fn manifests_that_cannot_be_read() {
    let Sandbox { store, .. } = sandbox();
    install(&store, "tiny", b"kernel", b"initrd");
    let path = store.manifest_path("tiny").unwrap();
    let good = fs::read_to_string(&path).unwrap();
    let check = |text: &str| {
        fs::remove_file(&path).unwrap();
        fs::write(&path, text).unwrap();
        assert_eq!(store.list().unwrap(), []);
        store.get("tiny").unwrap_err()
    };
    assert!(matches!(check("{"), ImageError::BadManifest { .. }));
    assert!(matches!(
        check(r#"{"version": 3, "layers": []}"#),
        ImageError::LaterManifest { version: 3, .. }
    ));
    let digest = store_digest(&good);
    assert!(matches!(
        check(&good.replace(&digest, "../../../etc/passwd")),
        ImageError::BadManifest { .. }
    ));
    for length in (0..good.len()).step_by(7) {
        check(&good[..length]);
    }
}

fn store_digest(manifest: &str) -> String {
    serde_json::from_str::<Manifest>(manifest)
        .unwrap()
        .kernel
        .sha256
}

#[test]
fn names_that_are_none() {
    let Sandbox { store, .. } = sandbox();
    for name in [
        "",
        ".",
        "..",
        "../tiny",
        "a/b",
        "Tiny",
        "-x",
        "tiny\n",
        &"x".repeat(65),
    ] {
        assert!(
            matches!(store.get(name), Err(ImageError::BadName(_))),
            "{name:?}"
        );
    }
    assert!(matches!(
        store.build("no-such", &Order::plain("no-such"), &NoWorkshop, &Quiet),
        Err(ImageError::NoRecipe { .. })
    ));
}

#[test]
fn the_second_of_two_waits_and_says_so() {
    struct Tell(mpsc::Sender<Phase>);
    impl Progress for Tell {
        fn phase(&self, phase: Phase) {
            self.0.send(phase).unwrap();
        }
    }
    let Sandbox { store, _directory } = sandbox();
    let first = store.lock(&Quiet).unwrap();
    let (sender, receiver) = mpsc::channel();
    let other = store.clone();
    let second = thread::spawn(move || other.lock(&Tell(sender)).map(drop));
    assert_eq!(
        receiver.recv_timeout(Duration::from_secs(10)),
        Ok(Phase::Waiting)
    );
    assert!(!second.is_finished());
    drop(first);
    second.join().unwrap().unwrap();
}

#[test]
fn a_verified_image_opens_at_once() {
    let Sandbox { store, .. } = sandbox();
    install(&store, "tiny", &vec![7; 64 << 20], b"initrd");
    let begin = Instant::now();
    store.get("tiny").unwrap();
    assert!(
        begin.elapsed() < Duration::from_millis(20),
        "{:?}",
        begin.elapsed()
    );
}
