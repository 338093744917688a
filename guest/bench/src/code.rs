//! Code made or changed while it runs: what just-in-time compilers, loaders and kernels do to a translator.

use crate::sys::{Mapping, Random, mix};

const READ_WRITE_EXECUTE: i32 = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const READ_EXECUTE: i32 = libc::PROT_READ | libc::PROT_EXEC;

const PAGE: usize = 4096;

/// Calls the function at `at`: it takes and returns a number.
fn call(code: &Mapping, at: usize, value: u64) -> u64 {
    assert!(at < code.bytes());
    // SAFETY: the caller has put a complete function of this type there: it changes only rax, rdi and flags, and returns.
    unsafe {
        let function: extern "C" fn(u64) -> u64 = std::mem::transmute(code.as_ptr().add(at));
        function(value)
    }
}

/// A function whose immediate operand is patched before each call.
pub fn self_modifying(units: u64) -> u64 {
    let code = Mapping::with_protection(PAGE, READ_WRITE_EXECUTE);
    // lea rax, [rdi + 0]; rol rax, 7; ret
    code.copy_in(
        0,
        &[0x48, 0x8d, 0x87, 0, 0, 0, 0, 0x48, 0xc1, 0xc0, 7, 0xc3],
    );
    let mut value = 1;
    for unit in 0..units {
        code.copy_in(3, &((unit as u32) & 0x7fff_ffff).to_le_bytes());
        value = call(&code, 0, value);
    }
    value
}

/// Appends one random operation on rax with an immediate.
fn push_operation(code: &mut Vec<u8>, random: &mut Random) {
    let value = random.next();
    let operand = (value >> 32) as u32 & 0x7fff_ffff;
    match value & 3 {
        0 => code.extend([0x48, 0x05]), // add rax, imm32
        1 => code.extend([0x48, 0x35]), // xor rax, imm32
        2 => code.extend([0x48, 0x2d]), // sub rax, imm32
        _ => {
            code.extend([0x48, 0xc1, 0xc0, operand as u8 & 63]); // rol rax, imm8
            return;
        }
    }
    code.extend(operand.to_le_bytes());
}

/// Appends a function of `operations` random operations.
fn push_function(code: &mut Vec<u8>, operations: usize, random: &mut Random) {
    code.extend([0x48, 0x89, 0xf8]); // mov rax, rdi
    for _ in 0..operations {
        push_operation(code, random);
    }
    code.push(0xc3); // ret
}

/// Fresh memory, a new function, made executable and called 50 times, per unit.
pub fn jit(units: u64) -> u64 {
    let mut random = Random::new(61);
    let mut value = 1;
    for _ in 0..units {
        let mut function = Vec::with_capacity(256);
        push_function(&mut function, 30, &mut random);
        let code = Mapping::with_protection(PAGE, READ_WRITE);
        code.copy_in(0, &function);
        code.protect(READ_EXECUTE);
        for _ in 0..50 {
            value = call(&code, 0, value);
        }
    }
    value
}

/// A loop whose body lies across the end of a page; one turn per unit.
pub fn page_end(units: u64) -> u64 {
    let code = Mapping::with_protection(2 * PAGE, READ_WRITE_EXECUTE);
    let body = [
        0x48, 0x31, 0xf8, // xor rax, rdi
        0x48, 0xc1, 0xc0, 5, // rol rax, 5
        0x48, 0x05, 0x39, 0x30, 0, 0, // add rax, 12345
        0x48, 0xff, 0xcf, // dec rdi
        0x75, 0xee, // jnz to the xor
        0xc3, // ret
    ];
    // The addition lies half in each page.
    let start = PAGE - 9;
    code.copy_in(start - 2, &[0x31, 0xc0]); // xor eax, eax
    code.copy_in(start, &body);
    call(&code, start - 2, units)
}

/// A megabyte of functions that each run once: nothing is reused, all is translation.
pub fn cold_code(units: u64) -> u64 {
    const FUNCTIONS: usize = 64;
    let mut random = Random::new(67);
    let mut sum = 0;
    for _ in 0..units {
        let mut bytes = Vec::new();
        let mut starts = Vec::with_capacity(FUNCTIONS);
        for _ in 0..FUNCTIONS {
            starts.push(bytes.len());
            push_function(&mut bytes, 40, &mut random);
        }
        let code = Mapping::with_protection(bytes.len().next_multiple_of(PAGE), READ_WRITE);
        code.copy_in(0, &bytes);
        code.protect(READ_EXECUTE);
        sum = starts
            .into_iter()
            .fold(sum, |sum, start| mix(sum, call(&code, start, sum)));
    }
    sum
}
