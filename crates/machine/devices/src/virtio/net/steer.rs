//! Automatic receive steering (virtio 1.2, 5.1.6.5.5): frames of a flow come in on the pair on which the driver sent
//! that flow's frames last.

/// Buckets of flows.
const BUCKETS: usize = 256;

/// Which pair each bucket of flows goes to.
pub(super) struct Steering([u8; BUCKETS]);

impl Default for Steering {
    fn default() -> Steering {
        Steering([0; BUCKETS])
    }
}

impl Steering {
    /// The driver sent this frame on `pair`.
    pub(super) fn learn(&mut self, frame: &[u8], pair: u16) {
        if let Some(bucket) = self.0.get_mut(bucket(frame)) {
            *bucket = pair as u8;
        }
    }

    /// The pair for a frame to the driver.
    pub(super) fn pair_of(&self, frame: &[u8]) -> u16 {
        self.0.get(bucket(frame)).copied().unwrap_or(0).into()
    }
}

/// The same for both directions of a flow. What is not TCP or UDP over plain IP is in one bucket.
fn bucket(frame: &[u8]) -> usize {
    let flow = || -> Option<u8> {
        let word = |at: usize| Some(u32::from_be_bytes(*frame.get(at..)?.first_chunk()?));
        let (addresses, protocol, ports) = match frame.get(12..14)? {
            [0x08, 0x00] => {
                let words = usize::from(frame.get(14)? & 15);
                (26..34, *frame.get(23)?, 14 + words * 4)
            }
            [0x86, 0xdd] => (22..54, *frame.get(20)?, 54),
            _ => return None,
        };
        if !matches!(protocol, 6 | 17) {
            return None;
        }
        let mut sum = 0_u32;
        for at in addresses.step_by(4) {
            sum ^= word(at)?;
        }
        let ports = word(ports)?;
        sum ^= ports ^ ports.rotate_left(16);
        Some((sum.wrapping_mul(0x9e37_79b9) >> 24) as u8)
    };
    flow().unwrap_or(0).into()
}
