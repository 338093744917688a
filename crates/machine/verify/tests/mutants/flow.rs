//! Rules about control flow: jumps, calls of stubs, the jump cache, links.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::guest::Block;
use crate::mutate::{DELTA, Mutant, Parts, UNUSED, has_memory, mov, operand_rules};

/// Jumps, in the block and out of it.
pub fn flow_rules(parts: &mut Parts<'_>) {
    let block = parts.block;
    let starts: Vec<u64> = parts.list.iter().map(|(_, i)| i.ip()).collect();
    let end = block.address + block.code.len() as u64;
    let first_check = parts.checks().first().map(|check| check.first);
    for n in 0..parts.list.len() {
        let instr = parts.instr(n);
        let near = instr.is_jmp_near() || instr.is_call_near() || instr.is_jcc_near();
        if !near || instr.op0_kind() != OpKind::NearBranch64 {
            continue;
        }
        let target = instr.near_branch_target();
        let to = |to: u64| move |i: &mut Instruction| i.set_near_branch64(to);
        // Into the middle of an instruction that is reached otherwise, too: not behind what this jump leads to.
        let behind = |i: &Instruction| (instr.ip()..=i.ip()).contains(&target);
        if let Some(other) = parts
            .list
            .iter()
            .map(|p| p.1)
            .find(|i| i.len() >= 7 && i.ip() > instr.ip() && !behind(i))
        {
            parts.change("into an instruction", n, to(other.ip() + 1));
        }
        for outside in [
            end,
            end + 16,
            block.address - 1,
            target + 0x10_0000,
            block.layout.cache.0,
        ] {
            if !starts.contains(&outside) && !is_stub(block, outside) {
                parts.change("out of the block", n, to(outside));
            }
        }
        if is_stub(block, target) {
            for off in [1, 2, 0u64.wrapping_sub(1)] {
                parts.change("beside a stub", n, to(target.wrapping_add(off)));
            }
            // A call as a jump, a jump as a call.
            let at = parts.list[n].0;
            let mut code = block.code.clone();
            code[at] ^= 1;
            parts.add("a stub in the wrong way", n, Some(code));
        }
        parts.change("a loop in the block", n, to(instr.ip()));
        parts.change("to the start of the block", n, to(block.address));
        // Past a check that comes later, from where no check has been.
        if instr.is_jcc_near() && first_check.is_some_and(|first| first > n) {
            for check in parts.checks() {
                let operation = parts.instr(check.first + DELTA).next_ip();
                parts.change("over a check", n, to(operation));
                let delta = parts.instr(check.first + DELTA).ip();
                parts.change("over a check", n, to(delta));
            }
        }
    }
}

fn is_stub(block: &Block, address: u64) -> bool {
    let stubs = &block.layout.stubs;
    [
        stubs.lookup,
        stubs.link,
        stubs.interpret,
        stubs.request,
        stubs.slow,
        stubs.commit,
        stubs.stored,
        stubs.block_exit,
    ]
    .contains(&address)
}

/// Calls of the slow path and what they are told.
pub fn call_rules(parts: &mut Parts<'_>) {
    let block = parts.block;
    let stubs = block.layout.stubs;
    for n in 1..parts.list.len() {
        let instr = parts.instr(n);
        if !instr.is_call_near() || instr.near_branch_target() != stubs.slow {
            continue;
        }
        parts.bytes("no slow path", n, &[]);
        for other in [stubs.commit, stubs.stored, stubs.block_exit] {
            parts.change("another stub for the slow path", n, |i| {
                i.set_near_branch64(other)
            });
        }
        let number = parts.instr(n - 1).immediate(1) as u32;
        let site = block.sites[&number];
        // Narrower sites, or such for loads, than what follows needs. What follows may touch fewer bytes than the
        // site has only where the processors' makers differ, which is not in the program.
        let narrower = block
            .sites
            .iter()
            .find(|s| s.1.size < site.size)
            .map(|s| *s.0);
        let load = block
            .sites
            .iter()
            .find(|s| site.write && !s.1.write)
            .map(|s| *s.0);
        for other in [narrower, load, Some(u32::MAX), Some(1 << 20)]
            .into_iter()
            .flatten()
        {
            parts.change("another operand's site", n - 1, |i| {
                i.set_immediate32(other)
            });
        }
        parts.bytes("no site", n - 1, &[]);
        // The host address in another place than the operand.
        parts.insert(
            "redefined between slow path and use",
            n,
            &[mov(Register::R10, Register::RAX)],
        );
        parts.insert(
            "redefined between slow path and use",
            n,
            &[mov(Register::R11, Register::R9)],
        );
        for to in UNUSED {
            parts.insert("a host address for the guest", n, &[mov(to, Register::R10)]);
        }
        if let Some(operation) = (n + 1..(n + 6).min(parts.list.len()))
            .find(|&n| has_memory(&parts.instr(n)) && parts.instr(n).memory_base() == Register::R10)
            && parts.list[n + 1..operation]
                .iter()
                .all(|p| !p.1.is_jmp_near())
        {
            operand_rules(parts, operation, site.size.into(), site.write, true);
        }
    }
}

/// Calls of system stubs and jumps to them.
pub fn system_rules(parts: &mut Parts<'_>) {
    let block = parts.block;
    let own = &block.layout.system[block.privilege];
    let foreign = &block.layout.system[1 - block.privilege];
    for n in 1..parts.list.len() {
        let target = parts.instr(n).near_branch_target();
        let given = own.given.contains(&target);
        let called = given || own.called.contains(&target);
        if !called && !own.jumped_to.contains(&target) {
            continue;
        }
        parts.bytes("no number for a stub", n - 1, &[]);
        let (kind, others) = if called {
            (&foreign.called, &own.jumped_to)
        } else {
            (&foreign.jumped_to, &own.called)
        };
        let forbidden = kind
            .iter()
            .filter(|stub| !own.called.contains(stub) && !own.jumped_to.contains(stub));
        for &other in forbidden {
            parts.change("a stub of the other privilege", n, |i| {
                i.set_near_branch64(other)
            });
        }
        for &other in others {
            parts.change("a stub that is not left like this", n, |i| {
                i.set_near_branch64(other)
            });
        }
        parts.change("inside a stub", n, |i| i.set_near_branch64(target + 1));
        if given || !called {
            parts.insert(
                "a host address for a stub",
                n - 1,
                &[
                    mov(Register::R10, Register::R11),
                    mov(Register::R10, Register::RSP),
                ][..1 + usize::from(!given)],
            );
        }
        if called {
            for to in UNUSED {
                for left in [Register::R10, Register::R11, Register::RCX] {
                    parts.insert("what a stub left for the guest", n, &[mov(to, left)]);
                }
            }
        }
    }
}

/// Jumps through the jump cache.
pub fn jump_rules(parts: &mut Parts<'_>) {
    let layout = parts.block.layout.clone();
    let privilege = parts.block.privilege;
    let (own, other) = (layout.jump[privilege], layout.jump[1 - privilege]);
    for n in 0..parts.list.len() {
        let instr = parts.instr(n);
        if instr.code() != Code::Jmp_rm64 || instr.op0_kind() != OpKind::Memory {
            continue;
        }
        let indexed = instr.memory_index() != Register::None;
        let offset = instr.memory_displacement64();
        for wrong in [
            offset + 8,
            offset - 8,
            offset - u64::from(own.target) + u64::from(own.tag),
            offset - u64::from(own.target) + u64::from(other.target),
            layout.fields[5].offset.into(),
            layout.tlb[privilege].delta.into(),
        ] {
            parts.displace("another jump target", n, wrong);
        }
        if indexed {
            for register in [Register::RAX, Register::R10, Register::RCX] {
                parts.change("another jump target", n, |i| i.set_memory_index(register));
            }
            parts.change("another scale", n, |i| i.set_memory_index_scale(4));
            parts.change("another jump target", n, |i| {
                i.set_memory_index(Register::None)
            });
        }
        parts.bytes("a jump to the guest's number", n, &[0x41, 0xff, 0xe2]);
        parts.bytes("a jump to the guest's number", n, &[0xff, 0xe0]);
        // Tag, sum, jrcxz, number, jump to the stub: the exit on a miss is two back.
        if parts.instr(n - 1).is_jmp_near() && parts.instr(n - 3).code() == Code::Jrcxz_rel8_64 {
            parts.bytes("no exit on a miss", n - 1, &[]);
            let (at, _) = parts.list[n - 3];
            let over = parts.block.code[at + 1];
            parts.bytes("the check always passes", n - 3, &[0xeb, over]);
            parts.bytes("another condition", n - 3, &[0x75, over]);
            for register in [Register::R13, Register::R11, Register::RCX] {
                parts.change("the sum of another address", n - 4, |i| {
                    i.set_memory_index(register)
                });
            }
            parts.displace("a sum that is off", n - 4, 1);
            let tag = parts.instr(n - 5).memory_displacement64();
            for wrong in [tag + 8, u64::from(other.tag), u64::from(own.target)] {
                if wrong != tag {
                    parts.displace("another tag", n - 5, wrong);
                }
            }
            if indexed {
                for mask in [layout.tlb_mask, layout.page_mask] {
                    parts.displace("another mask for the index", n - 6, mask.into());
                }
                for register in [Register::RAX, Register::R9] {
                    parts.change("the index of another address", n - 6, |i| {
                        i.set_op1_register(register);
                    });
                }
            } else {
                // The constant address of another index.
                let address = parts.instr(n - 6);
                if address.mnemonic() == Mnemonic::Mov && address.op1_kind() == OpKind::Immediate32
                {
                    parts.change("the index of another address", n - 6, |i| {
                        i.set_immediate32(i.immediate32() ^ 0x10);
                    });
                }
            }
        } else {
            panic!("an indirect jump of another form");
        }
    }
}

/// What is said of jumps that may be pointed elsewhere.
pub fn link_rules(parts: &mut Parts<'_>) {
    for n in 0..parts.block.links.len() {
        for (patch, cold) in [
            (1i64, 0i64),
            (-1, 0),
            (4, 0),
            (-4, 0),
            (0, 1),
            (0, 8),
            (64, 0),
        ] {
            let mut links = parts.block.links.clone();
            links[n].0 = (i64::from(links[n].0) + patch) as u32;
            links[n].1 = (i64::from(links[n].1) + cold) as u32;
            parts.out.push(Mutant {
                rule: "a link that is none",
                code: parts.block.code.clone(),
                links,
                what: format!("link {n} {patch} {cold}"),
            });
        }
    }
}
