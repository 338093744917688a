//! The control queue (virtio 1.2, 5.1.6.5).

use super::filter::ADDRESSES_MAX;
use super::{Net, feature};
use crate::virtio::chain::Reader;
use crate::virtio::device::Io;
use crate::virtio::queue::QueueError;

const OK: u8 = 0;
const ERROR: u8 = 1;

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_VLAN: u8 = 2;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;

impl Net {
    /// Carries out the driver's commands.
    pub(super) fn control(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        while let Some(chain) = io.pop(queue)? {
            let mut reader = chain.reader(io.memory());
            let done = self.command(&mut reader).is_some();
            let mut writer = chain.writer(io.memory());
            if writer.remaining() > 0 {
                writer.write_all(&[if done { OK } else { ERROR }])?;
            }
            let written = writer.written();
            io.complete(queue, chain, written)?;
        }
        Ok(())
    }

    /// None if the command is malformed, or of a feature that was not agreed on.
    fn command(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        let [class, command] = reader.read_array().ok()?;
        let needed = match (class, command) {
            (CLASS_RX, 0 | 1) | (CLASS_MAC, 0) => feature::CTRL_RX,
            (CLASS_RX, _) => feature::CTRL_RX_EXTRA,
            (CLASS_MAC, _) => feature::CTRL_MAC_ADDR,
            (CLASS_VLAN, _) => feature::CTRL_VLAN,
            (CLASS_ANNOUNCE, _) => feature::GUEST_ANNOUNCE,
            (CLASS_MQ, _) => feature::MQ,
            (CLASS_GUEST_OFFLOADS, _) => feature::CTRL_GUEST_OFFLOADS,
            _ => return None,
        };
        if !self.has(needed) || !self.has(feature::CTRL_VQ) {
            return None;
        }
        match (class, command) {
            (CLASS_RX, mode) => self.receive_mode(mode, reader),
            (CLASS_MAC, 0) => {
                let (unicast, multicast) = (addresses(reader)?, addresses(reader)?);
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
                Some(())
            }
            (CLASS_MAC, 1) => {
                self.mac = reader.read_array().ok()?;
                Some(())
            }
            (CLASS_VLAN, command @ (0 | 1)) => {
                let vlan = u16::from_le_bytes(reader.read_array().ok()?);
                if vlan >= 4096 {
                    return None;
                }
                if command == 0 {
                    self.filter.vlans.insert(vlan);
                } else {
                    self.filter.vlans.remove(&vlan);
                }
                Some(())
            }
            (CLASS_ANNOUNCE, 0) => {
                self.announce = false;
                Some(())
            }
            (CLASS_MQ, 0) => {
                let pairs = u16::from_le_bytes(reader.read_array().ok()?);
                if pairs == 0 || pairs > self.options.pairs {
                    return None;
                }
                (self.pairs, self.next_pair) = (pairs, 0);
                Some(())
            }
            (CLASS_GUEST_OFFLOADS, 0) => {
                let wanted = u64::from_le_bytes(reader.read_array().ok()?);
                if wanted & !(self.features & feature::GUEST_OFFLOADS) != 0 {
                    return None;
                }
                self.guest_offloads = wanted;
                self.shared.lock().capabilities = self.capabilities();
                Some(())
            }
            _ => None,
        }
    }

    fn receive_mode(&mut self, mode: u8, reader: &mut Reader<'_>) -> Option<()> {
        let [on] = reader.read_array().ok()?;
        let filter = &mut self.filter;
        let switch = match mode {
            0 => &mut filter.promiscuous,
            1 => &mut filter.all_multicast,
            2 => &mut filter.all_unicast,
            3 => &mut filter.no_multicast,
            4 => &mut filter.no_unicast,
            5 => &mut filter.no_broadcast,
            _ => return None,
        };
        *switch = on != 0;
        Some(())
    }
}

/// A list of addresses: { le32 entries; u8 macs[entries][6]; }.
fn addresses(reader: &mut Reader<'_>) -> Option<Vec<[u8; 6]>> {
    let count = u32::from_le_bytes(reader.read_array().ok()?) as usize;
    if count > ADDRESSES_MAX {
        return None;
    }
    (0..count).map(|_| reader.read_array().ok()).collect()
}
