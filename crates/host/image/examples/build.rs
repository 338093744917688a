//! Builds an image from the command line: `cargo run -p strata-image --example build -- tiny [CACHE]`.

use strata_image::{NoWorkshop, Order, Phase, Progress, Store};

struct Lines;

impl Progress for Lines {
    fn phase(&self, phase: Phase) {
        eprintln!("{phase}");
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().ok_or("usage: build NAME [CACHE]")?;
    let root = arguments
        .next()
        .map_or_else(Store::default_root, |root| Ok(root.into()))?;
    let image = Store::open(root)?.build(&name, &Order::plain(&name), &NoWorkshop, &Lines)?;
    println!("{}\n{}", image.kernel.display(), image.initrd.display());
    Ok(())
}
