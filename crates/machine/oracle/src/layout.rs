//! Where code and data lie: the same linear addresses in the native child and in the guest.

/// First byte of the code region (readable and executable, never writable).
pub const CODE: u64 = 0x1000_0000;
/// Bytes of the code region.
pub const CODE_SIZE: u64 = 4 << 20;
/// Where every case's code jumps at its end: to the exit stub natively, to UD2 in the guest. Not a round number: no
/// case should come upon it by chance, since what can be read there differs.
pub const TRAMPOLINE: u64 = CODE - 0x5a_7000;
/// The same for 32-bit code.
pub const TRAMPOLINE_32: u64 = TRAMPOLINE + 0x100;
/// Cases of one batch.
pub const BATCH: usize = 128;
/// Bytes of code room for each case.
pub const CASE_ROOM: u64 = 512;
/// The grid of cases is shifted so that some case of each page may cross into the next.
pub const CASE_SHIFT: u64 = 256;
/// Batches that fit the code region at the same time.
pub const BATCHES: u64 = CODE_SIZE / (BATCH as u64 * CASE_ROOM) - 1;
/// Bytes reserved behind a case's code for what ends it.
pub const TAIL: usize = 5;

/// Bytes compared and restored as one.
pub const LINE: usize = 64;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Rights of a data page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rights {
    /// Read and write.
    ReadWrite,
    /// Read only.
    ReadOnly,
}

/// Main data area: read-write, read-write, absent, read-only, read-write, absent.
pub const DATA: u64 = 0x2000_0000;
/// Data above 4 GiB: read-write, absent.
pub const HIGH: u64 = 0x12_3456_7000;
/// The read-only page.
pub const READ_ONLY: u64 = DATA + 3 * PAGE;

/// Writable data pages, in the order of the template.
pub const RW_PAGES: [u64; 4] = [DATA, DATA + PAGE, DATA + 4 * PAGE, HIGH];
/// Lines in all writable pages.
pub const RW_LINES: usize = RW_PAGES.len() * 4096 / LINE;

/// What the data pages hold at the start of each case of a batch.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Template(pub [[u8; 4096]; RW_PAGES.len()]);

/// Code selector of 64-bit user code on Linux, which the guest uses as well.
pub const USER_CS: u16 = 0x33;
/// Code selector of 32-bit user code.
pub const USER_CS_32: u16 = 0x23;
/// Selector of all other segments.
pub const USER_DS: u16 = 0x2b;
