//! Several CPUs: how they start, locked operations, interrupts between them, translations and code that one changes
//! and another uses.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::asm;
use super::boot::{EMPTY, TRAMPOLINE};
use super::check::{equal, holds};
use super::paging::{TABLE, entry, map, page, pages};
use super::trap::{self, Action};
use super::{apic, boot};

/// Vectors of their own.
const CALL: u64 = 0x60;
const SHOOT: u64 = 0x61;

/// What waiting CPUs do next; 0 is nothing.
static TASK: AtomicU64 = AtomicU64::new(0);
/// CPUs that have ended the task.
static DONE: AtomicU64 = AtomicU64::new(0);
static STARTED: AtomicU64 = AtomicU64::new(0);
static CPUS: AtomicU64 = AtomicU64::new(1);
static COUNTER: AtomicU64 = AtomicU64::new(0);
static TURN: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);
static SHOT: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicU64 = AtomicU64::new(0);
static CODE: AtomicU64 = AtomicU64::new(0);
static AREA: AtomicU64 = AtomicU64::new(0);

const ROUNDS: u64 = 500;

asm! {
    fn spin_lock(address) { "2: xor eax, eax" "mov ecx, 1" "lock cmpxchg [rdi], rcx" "je 3f" "pause" "jmp 2b" "3: ret" }
    fn spin_unlock(address) { "mov qword ptr [rdi], 0" "ret" }
    fn locked_inc(address) { "lock inc qword ptr [rdi]" "ret" }
    fn locked_add_across(address) { "lock add dword ptr [rdi], 1" "ret" }
    fn compare_16(address) {
        // Adds one to each half, together.
        "push rbx"
        "mov rax, [rdi]"
        "mov rdx, [rdi + 8]"
        "2: lea rbx, [rax + 1]"
        "lea rcx, [rdx + 1]"
        "lock cmpxchg16b [rdi]"
        "jne 2b"
        "pop rbx"
        "ret"
    }
    fn serialize() { "push rbx" "xor eax, eax" "cpuid" "pop rbx" "ret" }
    fn with_lock_bits(address, bit) { "lock bts qword ptr [rdi], rsi" "ret" }
}

/// The other CPUs' loop: wait for a task, do it, say so.
pub extern "C" fn main_of_others(cpu: u64) -> ! {
    trap::initialise_cpu(cpu);
    apic::enable();
    STARTED.fetch_add(1, SeqCst);
    let mut last = 0;
    loop {
        let task = TASK.load(SeqCst);
        if task == last {
            asm::sti_cli();
            asm::pause();
            continue;
        }
        last = task;
        work(task, cpu);
        DONE.fetch_add(1, SeqCst);
    }
}

/// One CPU's part of a task.
fn work(task: u64, cpu: u64) {
    let area = AREA.load(SeqCst);
    match task {
        1 => {
            for _ in 0..ROUNDS {
                locked_inc(area);
                // With a lock of one's own, plain memory is enough.
                spin_lock(area + 64);
                let value = asm::read(area + 128);
                asm::write(area + 128, value + 1);
                spin_unlock(area + 64);
                compare_16(area + 192);
                // Across a cache line, and across the end of a page.
                locked_add_across(area + 318);
                locked_add_across(area + 4094);
            }
        }
        // In turns around the ring, by memory.
        2 => {
            let cpus = CPUS.load(SeqCst);
            for round in 0..10 {
                while TURN.load(SeqCst) != round * cpus + cpu {
                    asm::pause();
                }
                TURN.fetch_add(1, SeqCst);
            }
        }
        // A translation that another CPU changes: the value may change at any time, never to what it was.
        3 => {
            let mut last = 0;
            while STOP.load(SeqCst) == 0 {
                asm::sti_cli();
                let value = asm::read(EMPTY);
                if value < last {
                    WRONG.fetch_add(1, SeqCst);
                }
                last = value;
            }
        }
        // Code that another CPU changes, run after it was told and has serialised.
        4 => {
            let mut seen = 0;
            while STOP.load(SeqCst) == 0 {
                let version = CODE.load(SeqCst);
                if version == seen {
                    asm::pause();
                    continue;
                }
                serialize();
                let value = asm::call(area);
                // A later version may be there already, an earlier one may not.
                if value < version {
                    WRONG.fetch_add(1, SeqCst);
                }
                seen = version;
                COUNTER.fetch_add(1, SeqCst);
            }
        }
        // Bits of one word, each CPU its own.
        5 => {
            for bit in (cpu..64).step_by(CPUS.load(SeqCst) as usize) {
                with_lock_bits(area + 512, bit);
            }
        }
        // Code that another CPU changes while this one runs it, a byte at a time.
        6 => {
            while STOP.load(SeqCst) == 0 {
                let value = asm::call(area);
                if value != 1 && value != 2 {
                    WRONG.fetch_add(1, SeqCst);
                }
                COUNTER.fetch_add(1, SeqCst);
            }
        }
        _ => {}
    }
}

/// All CPUs do a task; the first one its own part.
fn together(task: u64, own: impl FnOnce()) {
    DONE.store(0, SeqCst);
    TASK.store(task, SeqCst);
    own();
    while DONE.load(SeqCst) != CPUS.load(SeqCst) - 1 {
        asm::sti_cli();
        asm::pause();
    }
    TASK.store(0, SeqCst);
}

/// The handler of [`SHOOT`]: forgets a translation and says so.
extern "C" fn shot(_frame: u64) -> u64 {
    asm::invlpg(EMPTY);
    SHOT.fetch_add(1, SeqCst);
    apic::end();
    0
}

fn wait_for(value: &AtomicU64, want: u64) -> bool {
    (0..200_000_000u64).any(|_| {
        asm::pause();
        value.load(SeqCst) >= want
    })
}

pub fn run(cpus: u64) {
    CPUS.store(cpus, SeqCst);
    apic::enable();
    trap::on(CALL, Action::End);
    start(cpus);
    locked(cpus);
    interrupts(cpus);
    translations(cpus);
    code(cpus);
}

fn start(cpus: u64) {
    equal("CPUs", asm::cpuid_ebx(0xb, 1), cpus);
    boot::place_trampoline(TRAMPOLINE);
    for cpu in 1..cpus {
        // INIT, then the start-up IPI with the number of a page.
        apic::send_to(cpu, 5 << 8 | 1 << 14);
        apic::send_to(cpu, 6 << 8 | TRAMPOLINE >> 12);
        holds("a CPU starts", wait_for(&STARTED, cpu));
    }
    // One more start-up IPI to a CPU that runs is ignored.
    for cpu in 1..cpus {
        apic::send_to(cpu, 6 << 8 | TRAMPOLINE >> 12);
    }
    together(7, || {});
    equal("CPUs started", STARTED.load(SeqCst), cpus - 1);
}

fn locked(cpus: u64) {
    let area = pages(2);
    AREA.store(area, SeqCst);
    together(1, || work(1, 0));
    equal("LOCK INC", asm::read(area), cpus * ROUNDS);
    equal("LOCK CMPXCHG", asm::read(area + 128), cpus * ROUNDS);
    equal("LOCK CMPXCHG16B, low", asm::read(area + 192), cpus * ROUNDS);
    equal(
        "LOCK CMPXCHG16B, high",
        asm::read(area + 200),
        cpus * ROUNDS,
    );
    equal(
        "LOCK ADD across a line",
        asm::read32(area + 318),
        cpus * ROUNDS,
    );
    equal(
        "LOCK ADD across a page",
        asm::read32(area + 4094),
        cpus * ROUNDS,
    );
    together(2, || work(2, 0));
    equal("turns", TURN.load(SeqCst), cpus * 10);
    together(5, || work(5, 0));
    equal("LOCK BTS", asm::read(area + 512), u64::MAX);
}

fn interrupts(cpus: u64) {
    trap::calls(counted);
    trap::on(CALL, Action::Call);
    COUNTER.store(0, SeqCst);
    for round in 0..20 {
        for cpu in 1..cpus {
            apic::send_to(cpu, CALL);
        }
        if !wait_for(&COUNTER, (round + 1) * (cpus - 1)) {
            break;
        }
    }
    equal("IPIs one by one", COUNTER.load(SeqCst), 20 * (cpus - 1));
    COUNTER.store(0, SeqCst);
    apic::send(apic::OTHERS | CALL);
    holds("an IPI to all others", wait_for(&COUNTER, cpus - 1));
    trap::clear_log();
    apic::send(apic::ALL | CALL);
    asm::sti_cli();
    holds("an IPI to all", wait_for(&COUNTER, 2 * cpus - 1));
    equal("no more than that", COUNTER.load(SeqCst), 2 * cpus - 1);
    // Lowest priority goes to one of them.
    COUNTER.store(0, SeqCst);
    apic::set(apic::LDR, 1 << 24);
    apic::send_to(1, 1 << 8 | 1 << 11 | CALL);
    asm::sti_cli();
    holds("lowest priority", wait_for(&COUNTER, 1));
    equal("only one", COUNTER.load(SeqCst), 1);
    // A non-maskable one reaches a CPU that has IF clear.
    trap::on(2, Action::Call);
    COUNTER.store(0, SeqCst);
    apic::send(apic::OTHERS | 4 << 8);
    holds("NMIs", wait_for(&COUNTER, cpus - 1));
}

extern "C" fn counted(_frame: u64) -> u64 {
    COUNTER.fetch_add(1, SeqCst);
    apic::end();
    0
}

fn translations(cpus: u64) {
    trap::calls(shot);
    trap::on(SHOOT, Action::Call);
    let versions = [page(), page(), page(), page()];
    map(EMPTY, versions[0], TABLE);
    STOP.store(0, SeqCst);
    SHOT.store(0, SeqCst);
    let mut answered = true;
    together(3, || {
        for version in 1..=30u64 {
            let next = versions[(version % 4) as usize];
            // The page's content is new before it is mapped, and nobody may see an old page after the answers.
            asm::write(next, version);
            asm::write(entry(EMPTY, 1), next | TABLE);
            asm::invlpg(EMPTY);
            apic::send(apic::OTHERS | SHOOT);
            answered &= wait_for(&SHOT, version * (cpus - 1));
            // What was mapped before is spoilt: seen through an old translation, it goes back.
            asm::write(versions[((version + 3) % 4) as usize], 0);
        }
        STOP.store(1, SeqCst);
    });
    holds("all CPUs answered", answered);
    equal("translations of old", WRONG.load(SeqCst), 0);
    equal("answers", SHOT.load(SeqCst), 30 * (cpus - 1));
}

fn code(cpus: u64) {
    let area = page();
    asm::write(area, 0x0000_c300_0000_00b8); // mov eax, 0; ret
    AREA.store(area, SeqCst);
    STOP.store(0, SeqCst);
    COUNTER.store(0, SeqCst);
    together(4, || {
        for version in 1..=20 {
            asm::write32(area + 1, version);
            CODE.store(version, SeqCst);
            wait_for(&COUNTER, version * (cpus - 1));
        }
        STOP.store(1, SeqCst);
    });
    equal("code of old", WRONG.load(SeqCst), 0);
    equal("versions run", COUNTER.load(SeqCst), 20 * (cpus - 1));
    // A byte of an immediate: each CPU sees one value or the other.
    asm::write(area, 0x0000_c300_0000_01b8);
    STOP.store(0, SeqCst);
    COUNTER.store(0, SeqCst);
    together(6, || {
        for turn in 0..20 {
            asm::write8(area + 1, 1 + turn % 2);
            wait_for(&COUNTER, turn * 3);
        }
        STOP.store(1, SeqCst);
    });
    equal("a byte of an instruction", WRONG.load(SeqCst), 0);
    holds("calls while it changed", COUNTER.load(SeqCst) > 0);
}
