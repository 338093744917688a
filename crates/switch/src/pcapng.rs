//! Captures in the pcapng format (draft-ietf-opsawg-pcapng), which tcpdump and Wireshark read: what a mirror port saw.

use std::io::{self, Write};

use crate::config::PortId;
use crate::frame::Frame;
use crate::policy::Direction;
use crate::time::Time;

/// Link type of Ethernet.
const ETHERNET: u16 = 1;

/// Writes a capture. Each port is an interface with its name; each frame has its time and direction.
///
/// A checksum that the sender left to the network card is finished. A frame that stands for several packets is written as
/// the one that it is.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    /// Added to frames' times: what the owner's origin is in Unix time, nanoseconds.
    origin: u64,
    interfaces: Vec<PortId>,
    block: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins a capture. `origin` is the Unix time, in nanoseconds, of [`Time::ZERO`].
    ///
    /// # Errors
    /// `out` refuses.
    pub fn new(out: W, origin: u64) -> io::Result<Writer<W>> {
        let mut writer = Writer {
            out,
            origin,
            interfaces: Vec::new(),
            block: Vec::new(),
        };
        writer.block(0x0a0d_0d0a, |block| {
            block.extend(0x1a2b_3c4du32.to_le_bytes());
            block.extend(1u16.to_le_bytes());
            block.extend(0u16.to_le_bytes());
            // The section's length is not known.
            block.extend(u64::MAX.to_le_bytes());
            option(block, 4, b"Strata");
            option(block, 0, &[]);
        })?;
        Ok(writer)
    }

    /// Writes one block.
    fn block(&mut self, kind: u32, fill: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        self.block.clear();
        fill(&mut self.block);
        self.block.resize(self.block.len().next_multiple_of(4), 0);
        let len = u32::try_from(self.block.len() + 12)
            .map_err(io::Error::other)?
            .to_le_bytes();
        self.out.write_all(&kind.to_le_bytes())?;
        self.out.write_all(&len)?;
        self.out.write_all(&self.block)?;
        self.out.write_all(&len)
    }

    /// The number of a port's interface; the first frame of a port names it.
    fn interface(&mut self, port: PortId, name: &str) -> io::Result<u32> {
        if let Some(index) = self.interfaces.iter().position(|known| *known == port) {
            return Ok(index as u32);
        }
        self.block(1, |block| {
            block.extend(ETHERNET.to_le_bytes());
            block.extend(0u16.to_le_bytes());
            // No frame is cut.
            block.extend(0u32.to_le_bytes());
            option(block, 2, name.as_bytes());
            // Times are in nanoseconds.
            option(block, 9, &[9]);
            option(block, 0, &[]);
        })?;
        self.interfaces.push(port);
        Ok(self.interfaces.len().saturating_sub(1) as u32)
    }

    /// Writes a frame that a mirror port got; `name` is that of the port where it was seen. One that was not captured is
    /// passed over.
    ///
    /// # Errors
    /// The output refuses.
    pub fn write(&mut self, frame: &mut Frame, name: &str) -> io::Result<()> {
        let Some(seen) = frame.captured else {
            return Ok(());
        };
        frame.finish_checksum();
        let interface = self.interface(seen.port, name)?;
        let time = self
            .origin
            .saturating_add(seen.time.since(Time::ZERO).as_nanos() as u64);
        let len = frame.len() as u32;
        let bytes = frame.bytes();
        self.block(6, |block| {
            block.extend(interface.to_le_bytes());
            block.extend(((time >> 32) as u32).to_le_bytes());
            block.extend((time as u32).to_le_bytes());
            block.extend(len.to_le_bytes());
            block.extend(len.to_le_bytes());
            block.extend(bytes);
            block.resize(block.len().next_multiple_of(4), 0);
            let direction: u32 = match seen.direction {
                Direction::In => 1,
                Direction::Out => 2,
            };
            option(block, 2, &direction.to_le_bytes());
            option(block, 0, &[]);
        })
    }

    /// Hands what was written on.
    ///
    /// # Errors
    /// The output refuses.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// The output.
    pub fn into_inner(self) -> W {
        self.out
    }
}

/// An option, padded to 32 bits. A text longer than an option can be is cut.
fn option(block: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = value.get(..value.len().min(1024)).unwrap_or_default();
    block.extend(code.to_le_bytes());
    block.extend((value.len() as u16).to_le_bytes());
    block.extend(value);
    block.resize(block.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Captured;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn blocks_are_as_the_draft_says() {
        let mut writer = Writer::new(Vec::new(), 1_700_000_000_000_000_000).unwrap();
        for (port, direction, len) in [
            (3, Direction::In, 61),
            (5, Direction::Out, 60),
            (3, Direction::Out, 1514),
        ] {
            let mut frame = Frame::new(&vec![port as u8; len]);
            frame.captured = Some(Captured {
                port: PortId(port),
                direction,
                time: Time::from_nanos(17),
            });
            writer.write(&mut frame, &format!("port{port}")).unwrap();
        }
        writer.write(&mut Frame::new(&[0; 60]), "nobody").unwrap();
        let bytes = writer.into_inner();
        let mut kinds = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let len = word(&bytes, at + 4) as usize;
            assert!(len.is_multiple_of(4) && word(&bytes, at + len - 4) as usize == len);
            let kind = word(&bytes, at);
            if kind == 6 {
                let time =
                    u64::from(word(&bytes, at + 12)) << 32 | u64::from(word(&bytes, at + 16));
                assert_eq!(time, 1_700_000_000_000_000_017);
                let captured = word(&bytes, at + 20) as usize;
                let port = if word(&bytes, at + 8) == 0 { 3 } else { 5 };
                assert!(
                    bytes[at + 28..at + 28 + captured]
                        .iter()
                        .all(|byte| *byte == port)
                );
                let options = at + 28 + captured.next_multiple_of(4);
                assert_eq!(bytes[options..options + 4], [2, 0, 4, 0]);
                kinds.push((kind, captured, word(&bytes, options + 4)));
            } else {
                kinds.push((kind, 0, 0));
            }
            at += len;
        }
        assert_eq!(at, bytes.len());
        assert_eq!(
            kinds,
            [
                (0x0a0d_0d0a, 0, 0),
                (1, 0, 0),
                (6, 61, 1),
                (1, 0, 0),
                (6, 60, 2),
                (6, 1514, 2)
            ]
        );
    }
}
