//! The disk's bytes: reading and changing parts of clusters.

use super::map::{Mapping, Place, Target};
use super::{Failed, State, compressed, damaged};

/// A part of one cluster of the disk.
#[derive(Debug, Clone, Copy)]
struct Part {
    cluster: u64,
    /// Where in the cluster it begins.
    at: u64,
    len: u64,
}

impl State {
    /// The part of `offset..end` that lies in its first cluster.
    fn part(&self, offset: u64, end: u64) -> Part {
        let bytes = self.header.cluster();
        let at = offset & (bytes - 1);
        Part {
            cluster: offset >> self.header.cluster_bits,
            at,
            len: (bytes - at).min(end - offset),
        }
    }

    /// Bytes of a cluster of the disk that are part of the disk.
    fn bytes_in(&self, cluster: u64) -> u64 {
        let start = cluster << self.header.cluster_bits;
        self.header
            .cluster()
            .min(self.header.size.saturating_sub(start))
    }

    pub(super) fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Failed> {
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let part = self.part(at, end);
            let Some((piece, after)) = rest.split_at_mut_checked(part.len as usize) else {
                break;
            };
            let mapping = self.lookup(part.cluster)?;
            self.read_part(part, mapping, piece)?;
            at += part.len;
            rest = after;
        }
        Ok(())
    }

    fn read_part(&mut self, part: Part, mapping: Mapping, buf: &mut [u8]) -> Result<(), Failed> {
        match mapping {
            Mapping::Zero(_) => buf.fill(0),
            Mapping::Data(place) => self.data().read_at(place.offset + part.at, buf)?,
            Mapping::Below => self.read_below(part, buf)?,
            Mapping::Compressed(packed) => {
                let unpacked = self.unpack(packed)?;
                let range = part.at as usize..(part.at + part.len) as usize;
                match unpacked.get(range) {
                    Some(bytes) => buf.copy_from_slice(bytes),
                    None => return Err(damaged("a compressed cluster is too short")),
                }
            }
        }
        Ok(())
    }

    /// From the backing file, which may be shorter than the disk.
    fn read_below(&self, part: Part, buf: &mut [u8]) -> Result<(), Failed> {
        let Some(backing) = &self.backing else {
            buf.fill(0);
            return Ok(());
        };
        let start = (part.cluster << self.header.cluster_bits) + part.at;
        let there = backing.size().saturating_sub(start).min(part.len);
        let (from_below, behind) = buf.split_at_mut_checked(there as usize).unwrap_or_default();
        behind.fill(0);
        if from_below.is_empty() {
            return Ok(());
        }
        backing.read_at(start, from_below).map_err(Failed::Below)
    }

    fn unpack(&mut self, packed: super::map::Packed) -> Result<&[u8], Failed> {
        if self
            .unpacked
            .as_ref()
            .is_none_or(|(offset, _)| *offset != packed.offset)
        {
            let mut bytes = vec![0; packed.len as usize];
            self.file.read_at(packed.offset, &mut bytes)?;
            let mut cluster = vec![0; self.header.cluster() as usize];
            if !compressed::unpack(self.header.compression, &bytes, &mut cluster) {
                return Err(damaged(format!(
                    "the compressed data at {:#x} cannot be unpacked",
                    packed.offset
                )));
            }
            self.unpacked = Some((packed.offset, cluster));
        }
        Ok(self.unpacked.as_ref().map_or(&[], |(_, bytes)| bytes))
    }

    pub(super) fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), Failed> {
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let part = self.part(at, end);
            let Some((piece, after)) = rest.split_at_checked(part.len as usize) else {
                break;
            };
            self.write_part(part, piece)?;
            at += part.len;
            rest = after;
        }
        Ok(())
    }

    fn write_part(&mut self, part: Part, bytes: &[u8]) -> Result<(), Failed> {
        let mapping = self.lookup(part.cluster)?;
        if let Mapping::Data(place) = mapping
            && self.is_ours(place)?
        {
            self.data_mut().write_at(place.offset + part.at, bytes)?;
            return Ok(());
        }
        let kept = match mapping {
            _ if self.data.is_some() => Some(part.cluster << self.header.cluster_bits),
            Mapping::Zero(Some(place)) if self.is_ours(place)? => Some(place.offset),
            _ => None,
        };
        let (offset, zeroed) = match kept {
            Some(offset) => (offset, false),
            None => {
                let new = self.allocate()?;
                (new.offset, new.zeroed)
            }
        };
        let written = self.fill(part, mapping, bytes, offset, zeroed);
        match written.and_then(|()| self.remap(part.cluster, Target::Data(offset))) {
            Ok(()) => Ok(()),
            Err(error) => {
                // Nothing refers to it, unless the remapping itself went wrong after it had begun.
                if kept.is_none() && self.lookup(part.cluster).is_ok_and(|now| now == mapping) {
                    self.deallocate(offset)?;
                }
                Err(error)
            }
        }
    }

    /// Fills a whole cluster of the file: `bytes` in their place, around them what was there before.
    fn fill(
        &mut self,
        part: Part,
        before: Mapping,
        bytes: &[u8],
        offset: u64,
        zeroed: bool,
    ) -> Result<(), Failed> {
        let whole = part.at == 0 && part.len == self.bytes_in(part.cluster);
        if whole || (zeroed && self.is_zero(before)) {
            self.data_mut().write_at(offset + part.at, bytes)?;
            return Ok(());
        }
        let mut cluster = vec![0; self.header.cluster() as usize];
        let len = self.bytes_in(part.cluster);
        let all = Part { at: 0, len, ..part };
        let used = cluster.get_mut(..len as usize).unwrap_or_default();
        self.read_part(all, before, used)?;
        let range = part.at as usize..(part.at + part.len) as usize;
        if let Some(place) = cluster.get_mut(range) {
            place.copy_from_slice(bytes);
        }
        // A file with nothing but data need not be longer than the disk.
        if self.data.is_some() {
            cluster.truncate(len as usize);
        }
        self.data_mut().write_at(offset, &cluster)?;
        Ok(())
    }

    /// Whether a cluster of the disk is known to be zero without looking at its bytes.
    fn is_zero(&self, mapping: Mapping) -> bool {
        match mapping {
            Mapping::Below => self.backing.is_none(),
            Mapping::Zero(_) => true,
            Mapping::Data(_) | Mapping::Compressed(_) => false,
        }
    }

    /// Whether a cluster of the file may be written in place.
    fn is_ours(&mut self, place: Place) -> Result<bool, Failed> {
        if self.data.is_some() {
            return Ok(true);
        }
        if !place.copied {
            return Ok(false);
        }
        let cluster = place.offset >> self.header.cluster_bits;
        match self.refcount(cluster)? {
            0 => Err(damaged(format!(
                "the cluster at {:#x} is used and counted as free",
                place.offset
            ))),
            1 if self.metadata.contains(&cluster) => Err(damaged(format!(
                "data and a table are both at {:#x}",
                place.offset
            ))),
            count => Ok(count == 1),
        }
    }

    /// Whole clusters only: of the others nothing can be given back.
    pub(super) fn discard(&mut self, offset: u64, len: u64) -> Result<(), Failed> {
        let target = match (&self.backing, self.header.version) {
            (None, _) => Target::Below,
            (Some(_), 3) => Target::Zero,
            (Some(_), _) => return Ok(()),
        };
        self.parts(offset, len, |state, part| {
            if part.at == 0 && part.len == state.bytes_in(part.cluster) {
                state.remap(part.cluster, target)?;
            }
            Ok(())
        })
    }

    pub(super) fn write_zeroes(
        &mut self,
        offset: u64,
        len: u64,
        may_unmap: bool,
    ) -> Result<(), Failed> {
        self.parts(offset, len, |state, part| {
            let mapping = state.lookup(part.cluster)?;
            let whole = part.at == 0 && part.len == state.bytes_in(part.cluster);
            let target = if whole {
                state.zero_target(mapping, may_unmap)?
            } else {
                None
            };
            match target {
                Some(target) => state.remap(part.cluster, target),
                None if state.is_zero(mapping) => Ok(()),
                None => state.write_part(part, &vec![0; part.len as usize]),
            }
        })
    }

    /// What makes a whole cluster zero without writing it; none if nothing does or need be done.
    fn zero_target(&mut self, mapping: Mapping, may_unmap: bool) -> Result<Option<Target>, Failed> {
        Ok(match mapping {
            Mapping::Data(place) if !may_unmap => {
                if self.header.version == 3 && self.is_ours(place)? {
                    Some(Target::ZeroAt(place.offset))
                } else {
                    None
                }
            }
            Mapping::Zero(_) if !may_unmap => None,
            _ if self.backing.is_none() => Some(Target::Below),
            _ if self.header.version == 3 => Some(Target::Zero),
            _ => None,
        })
    }

    /// Runs `each` for every part of a range. A long range is committed in between when much is released.
    fn parts(
        &mut self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&mut State, Part) -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let part = self.part(at, end);
            each(self, part)?;
            self.end_change()?;
            at += part.len;
        }
        Ok(())
    }
}
