//! The entropy device (virtio 1.2, section 5.4): fills buffers with random bytes.

use std::io::Read;

use super::device::{DeviceKind, Io, VirtioDevice};
use super::queue::QueueError;
use crate::{RestoreError, SavedState};

const QUEUE: u16 = 0;
const QUEUE_SIZES: [u16; 1] = [64];

/// The most bytes given per request. Fewer than asked for is allowed (5.4.6.2).
const REQUEST_BYTES_MAX: usize = 4096;

/// The entropy device.
pub struct Rng {
    source: Box<dyn Read + Send>,
}

impl Rng {
    /// A device that gives the bytes of the host's random number generator.
    pub fn host() -> Rng {
        Rng::with_source(HostEntropy)
    }

    /// A device that gives the bytes of `source`. When it ends or fails, requests complete empty.
    pub fn with_source(source: impl Read + Send + 'static) -> Rng {
        Rng {
            source: Box::new(source),
        }
    }
}

/// `getrandom(2)` as a reader.
struct HostEntropy;

impl Read for HostEntropy {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        Ok(rustix::rand::getrandom(
            buf,
            rustix::rand::GetRandomFlags::empty(),
        )?)
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notified(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut buf = [0; REQUEST_BYTES_MAX];
        while let Some(chain) = io.pop(QUEUE)? {
            let wanted = (chain.writable_bytes() as usize).min(REQUEST_BYTES_MAX);
            let part = buf.get_mut(..wanted).unwrap_or_default();
            let got = self.source.read(part).unwrap_or(0);
            let mut writer = chain.writer(io.memory());
            writer.write_all(part.get(..got).unwrap_or_default())?;
            let written = writer.written();
            io.complete(QUEUE, chain, written)?;
        }
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        SavedState::new("virtio-rng", 1, &RngStateV1 {})
    }

    fn restore(&mut self, _features: u64, state: &SavedState) -> Result<(), RestoreError> {
        state.open("virtio-rng", 1).map(|RngStateV1 {}| ())
    }
}

/// Saved state: there is none beyond the queue.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct RngStateV1 {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testutil::Driver;

    #[test]
    fn fills_what_is_asked_for() {
        let mut driver = Driver::new(Rng::with_source(std::io::repeat(0x5a)));
        driver.start(0);
        let used = driver.request(QUEUE, &[], &[3, 5]);
        assert_eq!((used.written, used.bytes), (8, vec![0x5a; 8]));
        let used = driver.request(QUEUE, &[b"ignored"], &[10_000]);
        assert_eq!(used.written, 4096);
        let used = driver.request(QUEUE, &[b"nothing to fill"], &[]);
        assert_eq!(used.written, 0);
        assert_eq!(driver.interrupts(QUEUE), 3);
    }

    #[test]
    fn host_entropy_differs() {
        let mut driver = Driver::new(Rng::host());
        driver.start(0);
        let first = driver.request(QUEUE, &[], &[32]).bytes;
        let second = driver.request(QUEUE, &[], &[32]).bytes;
        assert_eq!((first.len(), second.len()), (32, 32));
        assert_ne!(first, second);
    }

    #[test]
    fn a_source_that_fails_gives_nothing() {
        let mut driver = Driver::new(Rng::with_source(std::io::empty()));
        driver.start(0);
        assert_eq!(driver.request(QUEUE, &[], &[32]).written, 0);
    }
}
