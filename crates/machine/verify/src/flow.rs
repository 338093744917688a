//! A block's control-flow graph, from its bytes: instruction starts, where each goes on, and an order without cycles.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use crate::layout::{Emitted, Layout, SystemStubs};

/// A stub that blocks jump to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    Lookup,
    Link,
    Interpret,
    Request,
    System,
}

/// A stub that blocks call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Call {
    Slow,
    Commit,
    Stored,
    BlockExit,
    System { given: bool },
}

/// Where control goes after an instruction. Numbers are offsets in the block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Flow {
    /// To the next instruction.
    Next,
    /// There.
    Jump(u32),
    /// There or to the next instruction, by flags.
    Branch(u32),
    /// There if RCX is zero, else to the next instruction.
    IfZero(u32),
    /// Out of the block.
    Exit(Exit),
    /// To a stub and back.
    Call(Call),
    /// Out of the block, to an address from memory.
    Indirect,
}

/// One instruction.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    pub instr: Instruction,
    pub flow: Flow,
    /// Offset behind it.
    pub end: u32,
    /// It may be pointed at another block.
    pub link: bool,
}

impl Node {
    /// Offsets that control may go on at inside the block.
    pub fn successors(&self) -> impl Iterator<Item = u32> + use<> {
        let (next, target) = match self.flow {
            Flow::Next | Flow::Call(_) => (Some(self.end), None),
            Flow::Jump(to) => (None, Some(to)),
            Flow::Branch(to) | Flow::IfZero(to) => (Some(self.end), Some(to)),
            Flow::Exit(_) | Flow::Indirect => (None, None),
        };
        next.into_iter().chain(target)
    }
}

/// A block taken apart.
pub struct Graph {
    pub nodes: BTreeMap<u32, Node>,
    /// Offsets of all nodes, each before those it goes on at.
    pub order: Vec<u32>,
}

impl Graph {
    /// Decodes everything that can be reached from the first byte.
    pub fn of(block: &Emitted<'_>, layout: &Layout) -> Result<Graph, String> {
        let mut nodes = BTreeMap::new();
        let mut waiting = vec![0];
        while let Some(offset) = waiting.pop() {
            if nodes.contains_key(&offset) {
                continue;
            }
            let node = decode(block, layout, offset)?;
            waiting.extend(node.successors());
            nodes.insert(offset, node);
        }
        let mut end = 0;
        for (&offset, node) in &nodes {
            if offset < end {
                return Err(format!("{offset:#x}: inside another instruction"));
            }
            end = node.end;
        }
        for &(patch, cold) in block.links {
            link(&mut nodes, patch, cold)?;
        }
        let order = order(&nodes)?;
        Ok(Graph { nodes, order })
    }
}

fn decode(block: &Emitted<'_>, layout: &Layout, offset: u32) -> Result<Node, String> {
    let bytes = block.code.get(offset as usize..).unwrap_or(&[]);
    let address = block.address.wrapping_add(offset.into());
    let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    if bytes.is_empty() {
        return Err(format!("{offset:#x}: past the end of the block"));
    }
    let instr = decoder.decode();
    if instr.is_invalid() {
        return Err(format!("{offset:#x}: no instruction"));
    }
    let end = offset + instr.len() as u32;
    let flow = flow(block, layout, &instr).map_err(|why| format!("{offset:#x}: {instr}: {why}"))?;
    Ok(Node {
        instr,
        flow,
        end,
        link: false,
    })
}

fn flow(block: &Emitted<'_>, layout: &Layout, instr: &Instruction) -> Result<Flow, &'static str> {
    use iced_x86::FlowControl as F;
    let stubs = &layout.stubs;
    let none = SystemStubs::default();
    let system = layout.system.get(block.privilege).unwrap_or(&none);
    let code = instr.code();
    // Prefixes change what some processors make of a branch.
    let plain = |len| {
        if instr.len() == len {
            Ok(())
        } else {
            Err("a branch with prefixes")
        }
    };
    let target = instr.near_branch_target();
    let inside = || {
        let offset = target.wrapping_sub(block.address);
        u32::try_from(offset)
            .ok()
            .filter(|&offset| (offset as usize) < block.code.len())
    };
    match instr.flow_control() {
        F::Next => Ok(Flow::Next),
        F::UnconditionalBranch => {
            match code {
                Code::Jmp_rel8_64 => plain(2)?,
                Code::Jmp_rel32_64 => plain(5)?,
                _ => return Err("a jump that is never emitted"),
            }
            let exits = [
                (stubs.lookup, Exit::Lookup),
                (stubs.link, Exit::Link),
                (stubs.interpret, Exit::Interpret),
                (stubs.request, Exit::Request),
            ];
            match exits.iter().find(|(address, _)| *address == target) {
                Some(&(_, exit)) => Ok(Flow::Exit(exit)),
                None if system.jumped_to.contains(&target) => Ok(Flow::Exit(Exit::System)),
                None => inside()
                    .map(Flow::Jump)
                    .ok_or("a jump out of the block to no stub"),
            }
        }
        F::ConditionalBranch => {
            let to = inside().ok_or("a conditional jump out of the block")?;
            if code == Code::Jrcxz_rel8_64 {
                plain(2)?;
                Ok(Flow::IfZero(to))
            } else if code.is_jcc_near() {
                plain(6)?;
                Ok(Flow::Branch(to))
            } else if code.is_jcc_short() {
                plain(2)?;
                Ok(Flow::Branch(to))
            } else {
                Err("a conditional jump that is never emitted")
            }
        }
        F::Call if code == Code::Call_rel32_64 => {
            plain(5)?;
            let calls = [
                (stubs.slow, Call::Slow),
                (stubs.commit, Call::Commit),
                (stubs.stored, Call::Stored),
                (stubs.block_exit, Call::BlockExit),
            ];
            match calls.iter().find(|(address, _)| *address == target) {
                Some(&(_, call)) => Ok(Flow::Call(call)),
                None if system.called.contains(&target) => {
                    Ok(Flow::Call(Call::System { given: false }))
                }
                None if system.given.contains(&target) => {
                    Ok(Flow::Call(Call::System { given: true }))
                }
                None => Err("a call of no stub"),
            }
        }
        F::IndirectBranch if code == Code::Jmp_rm64 => Ok(Flow::Indirect),
        _ => Err("control flow that is never emitted"),
    }
}

/// Checks that the rel32 at `patch` belongs to a jump that goes to `cold`, and marks it.
fn link(nodes: &mut BTreeMap<u32, Node>, patch: u32, cold: u32) -> Result<(), String> {
    let wrong = || format!("{patch:#x}: a link that is no jump to {cold:#x}");
    let (_, node) = nodes.range_mut(..patch).next_back().ok_or_else(wrong)?;
    let near = node.instr.code() == Code::Jmp_rel32_64 || node.instr.code().is_jcc_near();
    let to = match node.flow {
        Flow::Jump(to) | Flow::Branch(to) => Some(to),
        _ => None,
    };
    if !near || node.end != patch + 4 || to != Some(cold) {
        return Err(wrong());
    }
    node.link = true;
    Ok(())
}

/// An order in which each node comes before its successors; blocks have no loops of their own.
fn order(nodes: &BTreeMap<u32, Node>) -> Result<Vec<u32>, String> {
    let mut into: BTreeMap<u32, u32> = BTreeMap::new();
    for to in nodes.values().flat_map(Node::successors) {
        *into.entry(to).or_default() += 1;
    }
    let mut ready = vec![0];
    let mut order = Vec::with_capacity(nodes.len());
    if into.contains_key(&0) {
        return Err("a jump to the start of the block".into());
    }
    while let Some(offset) = ready.pop() {
        order.push(offset);
        let Some(node) = nodes.get(&offset) else {
            return Err(format!("{offset:#x}: nothing there"));
        };
        for to in node.successors() {
            if let Some(left) = into.get_mut(&to) {
                *left -= 1;
                if *left == 0 {
                    ready.push(to);
                }
            }
        }
    }
    if order.len() == nodes.len() {
        Ok(order)
    } else {
        Err("a loop inside the block".into())
    }
}
