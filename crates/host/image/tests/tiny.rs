//! Builds the real image from Debian's archive. Needs the network once; what it fetched stays with the build's other files.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use strata_image::{ImageError, NoWorkshop, Order, Phase, Progress, Store};

#[derive(Default)]
struct Phases(RefCell<Vec<Phase>>);

impl Progress for Phases {
    fn phase(&self, phase: Phase) {
        self.0.borrow_mut().push(phase);
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

/// Tells the summary of `cargo xtask test` that a test could not run here.
fn skip(name: &str, reason: &str) {
    println!("SKIPPED: {reason}");
    if let Some(path) = std::env::var_os("STRATA_TEST_SKIPS") {
        let mut file = fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        std::io::Write::write_all(&mut file, format!("{name}\t{reason}\n").as_bytes()).unwrap();
    }
}

#[test]
fn tiny_is_built_and_built_again_the_same() {
    let store = Store::open(Path::new(env!("CARGO_TARGET_TMPDIR")).join("image-cache")).unwrap();
    let phases = Phases::default();
    let image = match store.build("tiny", &Order::plain("tiny"), &NoWorkshop, &phases) {
        Err(
            error @ (ImageError::Network { .. }
            | ImageError::MissingProgram { .. }
            | ImageError::MissingKeyring),
        ) => {
            return skip("tiny_is_built_and_built_again_the_same", &error.to_string());
        }
        result => result.unwrap(),
    };
    assert!(
        phases
            .0
            .borrow()
            .ends_with(&[Phase::Download, Phase::Unpack, Phase::Write])
    );

    let kernel = fs::read(&image.kernel).unwrap();
    assert_eq!(&kernel[0x202..0x206], b"HdrS", "a bzImage");
    assert!(contains(&kernel, image.manifest.kernel_release.as_bytes()));
    let initrd = fs::read(&image.initrd).unwrap();
    assert!(initrd.starts_with(b"070701"));
    for part in [
        "etc/strata/modules\0",
        "bin/busybox\0",
        "/virtio_pci.ko\0",
        "/vsock.ko\0",
        "TRAILER!!!\0",
        "virtio:d00000013v*",
    ] {
        assert!(contains(&initrd, part.as_bytes()), "{part}");
    }

    let again = store
        .build(
            "tiny",
            &Order::plain("tiny"),
            &NoWorkshop,
            &Phases::default(),
        )
        .unwrap();
    assert_eq!(
        (again.manifest.kernel, again.manifest.initrd),
        (image.manifest.kernel, image.manifest.initrd)
    );
    assert_eq!(store.list().unwrap().len(), 1);
}
