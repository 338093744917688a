//! What the verifier is told: where things are in the vCPU context, and one finished block.

/// Some bytes of the vCPU context.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Field {
    /// Bytes above the host's `rsp`.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// What blocks may do with it.
    pub usage: Usage,
}

/// What blocks may do with a field of the context.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Usage {
    /// Read it.
    ReadOnly,
    /// Read and write it; the guest may learn its value.
    Guest,
    /// Read and write it, in one piece of 8 bytes; the guest learns nothing of it by itself.
    Scratch {
        /// The called stubs leave it as it is.
        kept: bool,
    },
}

/// The arrays of one privilege's soft TLB: 8 bytes per entry. A tag is the negated address of a page whose own index
/// is that of its entry, or hits no address at all; the delta of an entry that hits is host address minus linear
/// address of memory that this guest may access, all of its page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TlbArrays {
    /// Tags for loads.
    pub read: u32,
    /// Tags for stores, which allow loads as well.
    pub write: u32,
    /// Host address minus linear address.
    pub delta: u32,
}

/// The arrays of one privilege's jump cache: 8 bytes per entry. A tag is the negated address of code that the entry's
/// target, a block's entry, was translated from, or hits no address of its index.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JumpArrays {
    /// Negated addresses.
    pub tag: u32,
    /// Host addresses.
    pub target: u32,
}

/// Addresses of the stubs that blocks may reach.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Stubs {
    /// Jumped to with RCX = a number.
    pub lookup: u64,
    /// Jumped to with RCX = a number.
    pub link: u64,
    /// Jumped to with RCX = a number.
    pub interpret: u64,
    /// Jumped to.
    pub request: u64,
    /// Called with RCX = a site, R10 = any address; returns R10 = host address of that site's operand, R11 = 0.
    pub slow: u64,
    /// Called with RCX = a site.
    pub commit: u64,
    /// Called with RCX = a site.
    pub stored: u64,
    /// Called.
    pub block_exit: u64,
}

/// Stubs for instructions that a kernel uses all the time. They read and write the context and the guest's registers,
/// are given RCX = a number, and must not be given what the guest may not learn.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SystemStubs {
    /// Called. They return with any of the guest's registers changed.
    pub called: Vec<u64>,
    /// The same, with a value for the guest in R10.
    pub given: Vec<u64>,
    /// Jumped to, with values for the guest in R10 and R11.
    pub jumped_to: Vec<u64>,
}

/// Where things are. All offsets are from the host's `rsp`, which is the vCPU context while translated code runs; what
/// is not named here is out of bounds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layout {
    /// The context's fields that blocks may touch at a constant offset, without the caches below.
    pub fields: Vec<Field>,
    /// Mask that selects a TLB index from an address.
    pub tlb_mask: u32,
    /// Mask that selects the page number from an address.
    pub page_mask: u32,
    /// Mask that selects a jump-cache index from the sum that [`Layout::jump_slot`] has.
    pub jump_mask: u32,
    /// Entries of each jump cache.
    pub jump_entries: u64,
    /// Soft TLBs by privilege.
    pub tlb: [TlbArrays; 2],
    /// Jump caches by privilege.
    pub jump: [JumpArrays; 2],
    /// The stubs.
    pub stubs: Stubs,
    /// System stubs by privilege.
    pub system: [SystemStubs; 2],
    /// Start and end of the code cache.
    pub cache: (u64, u64),
}

impl Layout {
    /// The jump-cache index of an address: the low bits of the address + itself turned by 12 bits.
    pub fn jump_slot(&self, address: u64) -> u64 {
        address.wrapping_add(address.rotate_right(12)) % self.jump_entries
    }
}

/// What the slow path does for a memory operand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Site {
    /// Bytes of the operand.
    pub size: u32,
    /// It checks for a store.
    pub write: bool,
}

/// One block as it was put into the code cache.
#[derive(Clone, Copy)]
pub struct Emitted<'a> {
    /// Where it runs.
    pub address: u64,
    /// Its bytes.
    pub code: &'a [u8],
    /// Index of the TLB and the jump cache that belong to its privilege.
    pub privilege: usize,
    /// Jumps that may be pointed at another block: offsets of the rel32, and of the code that it points to until then
    /// and after.
    pub links: &'a [(u32, u32)],
    /// The memory operands' sites by number.
    pub site: &'a dyn Fn(u32) -> Option<Site>,
}

/// Somebody who looks at every block of an engine.
pub trait Inspect: Send + Sync {
    /// A block was put into the code cache and has not run yet.
    ///
    /// # Errors
    /// If it must not run, and why.
    fn block(&self, layout: &Layout, block: &Emitted<'_>) -> Result<(), String>;

    /// The rel32 at address `at` was pointed at address `target`.
    ///
    /// # Errors
    /// If code that goes there must not run, and why.
    fn connected(&self, layout: &Layout, at: u64, target: u64) -> Result<(), String>;
}
