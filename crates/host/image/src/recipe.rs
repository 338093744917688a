//! Recipes: which packages an image is made from, and what goes into it. They are data, in `images/` of the source tree.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::ImageError;

/// The recipes built in, by name.
const RECIPES: [(&str, &str); 2] = [
    (
        "debian",
        include_str!("../../../../images/debian/recipe.json"),
    ),
    ("tiny", include_str!("../../../../images/tiny/recipe.json")),
];

/// The recipe of the machine that puts disks together. It is no image that anybody runs.
const BUILDER: &str = include_str!("../../../../images/builder/recipe.json");

/// How to make one image.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The text it was read from.
    #[serde(skip)]
    pub text: &'static str,
    /// What the image is, in a line.
    pub about: String,
    /// The Debian release, by code name.
    pub release: String,
    /// The package whose dependency is the kernel's package.
    pub kernel: String,
    /// Drivers in the order to load them. What they depend on comes along.
    pub drivers: Vec<String>,
    /// Kernel command line of a machine that says nothing of its own.
    pub command_line: String,
    /// Package → path in the package → path in the RAM disk.
    #[serde(default)]
    pub copy: BTreeMap<String, BTreeMap<String, String>>,
    /// Link → target.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    /// Names in `bin/` that are links to busybox.
    #[serde(default)]
    pub applets: Vec<String>,
    /// Directory → mode in octal.
    #[serde(default)]
    pub directories: BTreeMap<String, String>,
    /// Path → text. Mode 0644, or 0755 if it is a script (`#!`).
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// The root disk. Without one the RAM disk is all there is; with one it only finds and mounts the disk.
    pub disk: Option<DiskRecipe>,
}

/// What is on a root disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecipe {
    /// Its size, in MiB, unless another is asked for.
    pub size_mib: u64,
    /// The smallest size that may be asked for, in MiB.
    pub least_mib: u64,
    /// Memory of a machine that says nothing of its own, in MiB.
    pub memory_mib: u32,
    /// Names of packages, and patterns as apt knows them. What they depend on comes along.
    pub packages: Vec<String>,
    /// Link → target.
    pub links: BTreeMap<String, String>,
    /// Path → text. Mode 0644.
    pub files: BTreeMap<String, String>,
}

impl Recipe {
    /// The recipe of this name.
    pub fn get(name: &str) -> Result<Recipe, ImageError> {
        let unknown = || {
            let known: Vec<&str> = RECIPES.iter().map(|(name, _)| *name).collect();
            ImageError::NoRecipe {
                name: name.to_owned(),
                known: known.join(", "),
            }
        };
        let (_, text) = RECIPES
            .iter()
            .find(|(known, _)| *known == name)
            .ok_or_else(unknown)?;
        Recipe::parse(name, text)
    }

    /// The recipe of the machine that puts disks together.
    pub fn builder() -> Result<Recipe, ImageError> {
        Recipe::parse("builder", BUILDER)
    }

    fn parse(name: &str, text: &'static str) -> Result<Recipe, ImageError> {
        let recipe: Recipe =
            serde_json::from_str(text).map_err(|source| ImageError::BadManifest {
                name: name.to_owned(),
                source,
            })?;
        Ok(Recipe { text, ..recipe })
    }

    /// The names of all recipes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        RECIPES.iter().map(|(name, _)| *name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_recipes_parse() {
        let builder = ("builder", Recipe::builder());
        let recipes = Recipe::names().map(|name| (name, Recipe::get(name)));
        for (name, recipe) in recipes.chain([builder]) {
            let recipe = recipe.unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert!(!recipe.drivers.is_empty());
            for mode in recipe.directories.values() {
                u32::from_str_radix(mode, 8).unwrap();
            }
        }
        assert!(matches!(
            Recipe::get("none"),
            Err(ImageError::NoRecipe { .. })
        ));
    }
}
