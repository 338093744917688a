//! Recipes: which packages an image is made from, and what goes into it. They are data, in `images/` of the source tree.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::ImageError;

/// The recipes built in, by name.
const RECIPES: [(&str, &str); 1] = [("tiny", include_str!("../../../../images/tiny/recipe.json"))];

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
    /// Package → path in the package → path in the image.
    pub copy: BTreeMap<String, BTreeMap<String, String>>,
    /// Link → target.
    pub links: BTreeMap<String, String>,
    /// Names in `bin/` that are links to busybox.
    pub applets: Vec<String>,
    /// Directory → mode in octal.
    pub directories: BTreeMap<String, String>,
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
        for name in Recipe::names() {
            let recipe = Recipe::get(name).unwrap();
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
