//! Kernel modules: what a module says of itself (its `.modinfo` section), and which ones a driver needs.

use std::collections::{BTreeMap, HashSet};

/// The parts of a module's description that matter for loading it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Names of modules that must be there first, as written (`-` and `_` are the same).
    pub depends: Vec<String>,
    /// Shell patterns of the devices it drives.
    pub aliases: Vec<String>,
}

/// Reads the `.modinfo` section of a 64-bit little-endian ELF object. None if it is not one or has no such section.
pub fn module_info(object: &[u8]) -> Option<ModuleInfo> {
    if object.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = object.get(at..at.checked_add(size)?)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        usize::try_from(value).ok()
    };
    let (table, entry_size) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names_index) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(entry_size)?);
    let contents = |index: usize| {
        let at = header(index)?;
        let (offset, size) = (
            number(at.checked_add(0x18)?, 8)?,
            number(at.checked_add(0x20)?, 8)?,
        );
        object.get(offset..offset.checked_add(size)?)
    };
    let names = contents(names_index)?;
    let section = (0..count).find(|&index| {
        let name = header(index)
            .and_then(|at| number(at, 4))
            .and_then(|at| names.get(at..));
        name.is_some_and(|name| name.starts_with(b".modinfo\0"))
    })?;
    let mut info = ModuleInfo::default();
    for entry in contents(section)?.split(|&byte| byte == 0) {
        let Some((key, value)) = std::str::from_utf8(entry)
            .ok()
            .and_then(|entry| entry.split_once('='))
        else {
            continue;
        };
        match key {
            "depends" => {
                info.depends = value
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned)
                    .collect()
            }
            "alias" => info.aliases.push(value.to_owned()),
            _ => {}
        }
    }
    Some(info)
}

/// The name the kernel knows a module file by: `drivers/misc/pvpanic-mmio.ko` is `pvpanic_mmio`.
pub fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    Some(file.strip_suffix(".ko")?.replace('-', "_"))
}

/// The modules to load for one driver, in order, itself last. Err is the name of a module that is missing.
pub fn load_order(
    driver: &str,
    modules: &BTreeMap<String, ModuleInfo>,
) -> Result<Vec<String>, String> {
    fn visit(
        name: &str,
        modules: &BTreeMap<String, ModuleInfo>,
        seen: &mut HashSet<String>,
        order: &mut Vec<String>,
    ) -> Result<(), String> {
        let name = name.replace('-', "_");
        if !seen.insert(name.clone()) {
            return Ok(());
        }
        for dependency in &modules.get(&name).ok_or_else(|| name.clone())?.depends {
            visit(dependency, modules, seen, order)?;
        }
        order.push(name);
        Ok(())
    }
    let (mut seen, mut order) = (HashSet::new(), Vec::new());
    visit(driver, modules, &mut seen, &mut order)?;
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn modules(list: &[(&str, &[&str])]) -> BTreeMap<String, ModuleInfo> {
        let info = |depends: &[&str]| ModuleInfo {
            depends: depends.iter().map(|d| d.to_string()).collect(),
            aliases: vec![],
        };
        list.iter()
            .map(|(name, depends)| (name.to_string(), info(depends)))
            .collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let modules = modules(&[
            ("virtio", &[]),
            ("virtio_ring", &["virtio"]),
            ("virtio_pci_modern_dev", &[]),
            (
                "virtio_pci",
                &["virtio_ring", "virtio-pci-modern-dev", "virtio"],
            ),
        ]);
        assert_eq!(
            load_order("virtio-pci", &modules).unwrap(),
            [
                "virtio",
                "virtio_ring",
                "virtio_pci_modern_dev",
                "virtio_pci"
            ]
        );
        assert_eq!(load_order("absent", &modules).unwrap_err(), "absent");
    }

    #[test]
    fn circles_end() {
        let modules = modules(&[("a", &["b"]), ("b", &["a"])]);
        assert_eq!(load_order("a", &modules).unwrap(), ["b", "a"]);
    }

    /// The smallest object with a `.modinfo`: a header, two section headers, names, and the section.
    fn object(modinfo: &[u8]) -> Vec<u8> {
        let names = b".modinfo\0";
        let mut bytes = vec![0; 0x40 + 2 * 0x40];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let names_at = bytes.len();
        let mut put = |at: usize, value: usize| {
            bytes[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes())
        };
        put(0x28, 0x40);
        put(0x40 + 0x18, names_at);
        put(0x40 + 0x20, names.len());
        put(0x80 + 0x18, names_at + names.len());
        put(0x80 + 0x20, modinfo.len());
        // The names section's own name must not look like `.modinfo`.
        bytes[0x40] = 1;
        bytes[0x3a..0x40].copy_from_slice(&[0x40, 0, 2, 0, 0, 0]);
        bytes.extend_from_slice(names);
        bytes.extend_from_slice(modinfo);
        bytes
    }

    #[test]
    fn reads_modinfo() {
        let info = module_info(&object(
            b"license=GPL\0alias=virtio:d00000002v*\0alias=x\0depends=virtio,virtio_ring\0",
        ))
        .unwrap();
        assert_eq!(info.aliases, ["virtio:d00000002v*", "x"]);
        assert_eq!(info.depends, ["virtio", "virtio_ring"]);
        assert_eq!(module_info(b"\x7fELF"), None);
    }

    proptest! {
        #[test]
        fn damaged_objects_do_no_harm(at in 0usize..220, byte: u8, cut in 0usize..220) {
            let mut bytes = object(b"depends=a\0");
            let length = bytes.len();
            bytes[at % length] = byte;
            bytes.truncate(length - cut % length);
            let _ = module_info(&bytes);
        }
    }
}
