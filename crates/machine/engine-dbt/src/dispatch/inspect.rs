//! What an inspector of translated code is told: the layout of the context, and each block before it runs.

use strata_verify::{Emitted, Field, JumpArrays, Layout, Site, TlbArrays, Usage};

use super::*;
use crate::caches::JUMP_ENTRIES;
use crate::code::Link;
use crate::cpu::{Privilege, off};
use crate::translate::Translated as Block;

/// Where things are, for code in `code`.
fn layout(code: &CodeMap, stubs: &Stubs) -> Layout {
    let field = |offset, usage| Field {
        offset,
        size: 8,
        usage,
    };
    let mut fields = vec![
        field(off::INTERRUPTS_ON, Usage::Guest),
        field(off::SYSTEM_FLAGS, Usage::ReadOnly),
        // The request word and the deferred word behind it.
        field(off::REQUEST, Usage::ReadOnly),
        field(off::RETIRED, Usage::Guest),
        field(off::PAUSES, Usage::Guest),
    ];
    fields.extend((0..16).map(|n| field(off::gpr(n), Usage::Guest)));
    fields.extend((0..6).map(|n| field(off::seg_base(n), Usage::ReadOnly)));
    for register in 0..6 {
        fields.push(Field {
            size: 2,
            ..field(off::selector(register), Usage::ReadOnly)
        });
    }
    let control = (0..5).filter_map(off::control);
    fields.extend(control.map(|offset| field(offset, Usage::ReadOnly)));
    // The stubs and the slow path use words 2 to 6 themselves.
    fields.extend((0..8).map(|n| {
        let kept = matches!(n, 0 | 1 | 7);
        field(off::temp(n), Usage::Scratch { kept })
    }));
    let privileges = [Privilege::Supervisor as usize, Privilege::User as usize];
    Layout {
        fields,
        tlb_mask: off::TLB_MASK,
        page_mask: off::PAGE_MASK,
        jump_mask: off::JUMP_MASK,
        jump_entries: JUMP_ENTRIES as u64,
        tlb: privileges.map(|privilege| TlbArrays {
            read: off::tlb_read(privilege),
            write: off::tlb_write(privilege),
            delta: off::tlb_delta(privilege),
        }),
        jump: privileges.map(|privilege| JumpArrays {
            tag: off::jump_tag(privilege),
            target: off::jump_target(privilege),
        }),
        stubs: strata_verify::Stubs {
            lookup: stubs.lookup,
            link: stubs.link,
            interpret: stubs.interpret,
            request: stubs.request,
            slow: stubs.slow,
            commit: stubs.commit,
            stored: stubs.stored,
            block_exit: stubs.block_exit,
        },
        system: privileges.map(|privilege| strata_verify::SystemStubs {
            called: stubs.system.called(privilege),
            given: stubs.system.given(privilege),
            jumped_to: stubs.system.jumped_to(privilege),
        }),
        cache: code.range(),
    }
}

impl Translated {
    /// Shows blocks to `inspector` from here on.
    pub(crate) fn set_inspector(&mut self, inspector: Option<Arc<dyn Inspect>>) {
        self.inspector = inspector;
    }

    /// Shows block `id`, which was just made and inserted, to the inspector.
    pub(super) fn inspect_block(&self, id: u32, made: &Block) -> Result<(), EngineError> {
        let (Some(inspector), Some(block)) = (&self.inspector, self.code.block(id)) else {
            return Ok(());
        };
        let links: Vec<_> = made
            .links
            .iter()
            .map(|link| (link.patch, link.cold))
            .collect();
        let emitted = Emitted {
            address: self.code.address(block.entry),
            code: &made.code,
            privilege: usize::from(Mode(block.key.mode).user()),
            links: &links,
            site: &|number| {
                let site = self.code.mem_site(number)?;
                Some(Site {
                    size: site.size.into(),
                    write: site.access != OperandAccess::Read,
                })
            },
        };
        inspector
            .block(&layout(&self.code, &self.stubs), &emitted)
            .map_err(|why| {
                EngineError::Internal(format!(
                    "the block of guest RIP {:#x} must not run: {why}",
                    block.key.rip
                ))
            })
    }

    /// Tells the inspector that `link` goes to block `id` now.
    pub(super) fn inspect_link(&self, link: &Link, id: u32) -> Result<(), EngineError> {
        let (Some(inspector), Some(block)) = (&self.inspector, self.code.block(id)) else {
            return Ok(());
        };
        let (at, target) = (
            self.code.address(link.patch),
            self.code.address(block.entry),
        );
        inspector
            .connected(&layout(&self.code, &self.stubs), at, target)
            .map_err(|why| EngineError::Internal(format!("a jump must not be connected: {why}")))
    }
}
