//! The header of every packet between guest and device (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;

/// The device's own address: "the host".
pub const HOST_CID: u64 = 2;

/// Streams, the only type of socket there is here.
pub const TYPE_STREAM: u16 = 1;

/// SHUTDOWN flag: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
pub mod op {
    /// Open a connection.
    pub const REQUEST: u16 = 1;
    /// It is open.
    pub const RESPONSE: u16 = 2;
    /// It is gone, or never was.
    pub const RESET: u16 = 3;
    /// One side stops sending, receiving, or both.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const DATA: u16 = 5;
    /// Only the credit fields matter.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Please send a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// struct virtio_vsock_hdr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Address of the sender.
    pub src_cid: u64,
    /// Address of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Type of socket.
    pub socket_type: u16,
    /// What it is for; see [`op`].
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Bytes the sender can buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer, ever, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header as it is in a packet.
    pub fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Header {
        let mut fields = Fields(&bytes);
        Header {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            socket_type: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// The header as it is in a packet.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.socket_type.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Takes fields off the front; zeroes once the bytes are used up.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk::<N>().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            socket_type: 6,
            op: 7,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 0x0a0b_0c0d,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes.len(), HEADER_BYTES);
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[28..32], [6, 0, 7, 0]);
        assert_eq!(bytes[40..], [13, 12, 11, 10]);
        assert_eq!(Header::from_bytes(bytes.try_into().unwrap()), header);
    }
}
