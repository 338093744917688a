//! What somebody wants built: a recipe's image, or one of their own made from it.

use serde::{Deserialize, Serialize};

use crate::error::ImageError;
use crate::recipe::Recipe;
use crate::sources;

/// The most that a root disk may have, in MiB: what an ext4 file system with blocks of 4 KiB and 32-bit numbers holds.
const SIZE_MOST_MIB: u64 = 16 << 20;

/// What to build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The recipe to follow.
    pub from: String,
    /// Packages to add, by name.
    #[serde(default)]
    pub packages: Vec<String>,
    /// The root disk's size in MiB, if not the recipe's.
    #[serde(default)]
    pub size_mib: Option<u64>,
    /// The mirror to fetch from, if not the host's.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Lines of `authorized_keys` for root.
    #[serde(default)]
    pub ssh_keys: Option<String>,
}

impl Order {
    /// The image of a recipe, as it is.
    pub fn plain(recipe: &str) -> Order {
        Order {
            from: recipe.to_owned(),
            ..Order::default()
        }
    }

    /// Whether it asks for nothing but the recipe. The mirror does not count: all mirrors have the same packages.
    pub fn is_plain(&self) -> bool {
        self.packages.is_empty() && self.size_mib.is_none() && self.ssh_keys.is_none()
    }

    /// Refuses what makes no sense before anything is fetched.
    pub fn check(&self, name: &str, recipe: &Recipe) -> Result<(), ImageError> {
        let is_recipe = Recipe::names().any(|known| known == name);
        if is_recipe && (name != self.from || !self.is_plain()) {
            return Err(ImageError::Reserved(name.to_owned()));
        }
        if let Some(bad) = self.packages.iter().find(|name| !is_package_name(name)) {
            return Err(ImageError::BadPackageName(bad.clone()));
        }
        if let Some(mirror) = self
            .mirror
            .as_ref()
            .filter(|text| !sources::is_mirror(text))
        {
            return Err(ImageError::BadMirror(mirror.clone()));
        }
        let Some(disk) = &recipe.disk else {
            let options = [
                ("--size", self.size_mib.is_some()),
                ("--ssh-key", self.ssh_keys.is_some()),
            ];
            return match options.into_iter().find(|(_, given)| *given) {
                Some((option, _)) => Err(ImageError::NoRootDisk {
                    base: self.from.clone(),
                    option,
                }),
                None => Ok(()),
            };
        };
        match self.size_mib {
            Some(asked) if !(disk.least_mib..=SIZE_MOST_MIB).contains(&asked) => {
                Err(ImageError::BadSize {
                    asked,
                    least: disk.least_mib,
                    most: SIZE_MOST_MIB,
                })
            }
            _ => Ok(()),
        }
    }
}

/// Debian Policy 5.6.1, without what apt would read as more than a name.
fn is_package_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() >= 2
        && name.len() <= 128
        && name.bytes().next().is_some_and(plain)
        // At its end apt takes these for "remove" and "install".
        && !name.ends_with('-')
        && name.bytes().all(|byte| plain(byte) || b"+-.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, order: Order) -> Result<(), ImageError> {
        let recipe = Recipe::get(&order.from).unwrap();
        order.check(name, &recipe)
    }

    #[test]
    fn package_names() {
        for name in ["gcc", "g++", "libstdc++6", "python3.11", "0ad"] {
            assert!(is_package_name(name), "{name}");
        }
        for name in [
            "",
            "a",
            "-y",
            "gcc-",
            "Gcc",
            "a b",
            "a=1",
            "a/sid",
            "?essential",
            "a:i386",
            "../x",
        ] {
            assert!(!is_package_name(name), "{name}");
        }
    }

    #[test]
    fn orders_that_make_no_sense_are_refused() {
        let debian = || Order::plain("debian");
        let tiny = || Order::plain("tiny");
        check("debian", debian()).unwrap();
        check(
            "debian",
            Order {
                mirror: Some("https://x/debian".into()),
                ..debian()
            },
        )
        .unwrap();
        check(
            "web",
            Order {
                packages: vec!["nginx".into()],
                size_mib: Some(8192),
                ..debian()
            },
        )
        .unwrap();
        assert!(matches!(
            check("debian", tiny()),
            Err(ImageError::Reserved(_))
        ));
        let order = Order {
            size_mib: Some(8192),
            ..debian()
        };
        assert!(matches!(
            check("debian", order),
            Err(ImageError::Reserved(_))
        ));
        let order = Order {
            size_mib: Some(100),
            ..debian()
        };
        assert!(matches!(
            check("web", order),
            Err(ImageError::BadSize { least: 1024, .. })
        ));
        let order = Order {
            packages: vec!["-o".into()],
            ..debian()
        };
        assert!(matches!(
            check("web", order),
            Err(ImageError::BadPackageName(_))
        ));
        for mirror in [
            "ftp://x",
            "http://x [trusted=yes]",
            "x",
            "http://x\ndeb http://y",
        ] {
            let order = Order {
                mirror: Some(mirror.into()),
                ..debian()
            };
            assert!(
                matches!(check("web", order), Err(ImageError::BadMirror(_))),
                "{mirror}"
            );
        }
        let order = Order {
            packages: vec!["jq".into()],
            ..tiny()
        };
        check("mine", order).unwrap();
        let order = Order {
            size_mib: Some(2048),
            ..tiny()
        };
        assert!(matches!(
            check("mine", order),
            Err(ImageError::NoRootDisk {
                option: "--size",
                ..
            })
        ));
    }
}
