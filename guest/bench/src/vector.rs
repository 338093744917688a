//! Floating point and SIMD. No mathematical library: its functions differ by CPU, and checksums must not.

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

use crate::sys::{Random, mix};

/// Products of 64 × 64 matrices and a planet system, in double precision.
pub fn double(units: u64) -> u64 {
    const SIZE: usize = 64;
    let mut random = Random::new(41);
    let mut fraction = || (random.next() >> 11) as f64 / (1_u64 << 53) as f64;
    let left: Vec<f64> = (0..SIZE * SIZE).map(|_| fraction()).collect();
    let mut right: Vec<f64> = (0..SIZE * SIZE).map(|_| fraction()).collect();
    let mut bodies: Vec<[f64; 6]> = (0..5)
        .map(|_| std::array::from_fn(|_| fraction()))
        .collect();
    let mut sum = 0;
    for _ in 0..units {
        let mut product = vec![0.0; SIZE * SIZE];
        for row in 0..SIZE {
            for inner in 0..SIZE {
                let factor = left[row * SIZE + inner] / SIZE as f64;
                for column in 0..SIZE {
                    product[row * SIZE + column] += factor * right[inner * SIZE + column];
                }
            }
        }
        for _ in 0..200 {
            move_bodies(&mut bodies);
        }
        sum = mix(sum, product[SIZE + 1].to_bits() ^ bodies[0][0].to_bits());
        right.copy_from_slice(&product);
        right.iter_mut().for_each(|value| *value += 0.25);
    }
    sum
}

/// One step of five bodies that attract each other: `[x, y, z, vx, vy, vz]` each.
fn move_bodies(bodies: &mut [[f64; 6]]) {
    const STEP: f64 = 0.001;
    for first in 0..bodies.len() {
        for second in first + 1..bodies.len() {
            let (a, b) = (bodies[first], bodies[second]);
            let (x, y, z) = (a[0] - b[0], a[1] - b[1], a[2] - b[2]);
            let squared = x * x + y * y + z * z + 0.01;
            let strength = STEP / (squared * squared.sqrt());
            for (axis, distance) in [x, y, z].into_iter().enumerate() {
                bodies[first][3 + axis] -= distance * strength;
                bodies[second][3 + axis] += distance * strength;
            }
        }
    }
    for body in bodies {
        for axis in 0..3 {
            body[axis] += STEP * body[3 + axis];
        }
    }
}

/// The old floating-point unit: 80-bit arithmetic on its register stack.
pub fn x87(units: u64) -> u64 {
    let factor = 1.000_000_1_f64;
    let mut value = [0_u8; 10];
    // SAFETY: starts and ends with an empty register stack and writes only `value`, which has the 10 bytes of an extended double.
    unsafe {
        asm!(
            "fld1",                         // x
            "2:",
            "fld qword ptr [{factor}]",     // f, x
            "fmul st(1), st(0)",            // f, x·f
            "fadd st(0), st(1)",            // f + x, x
            "fsqrt",
            "fld1",
            "faddp st(1), st(0)",           // 1 + √(f + x), x
            "fdivp st(1), st(0)",           // x / (1 + √(f + x))
            "fld1",
            "faddp st(1), st(0)",
            "dec {units}",
            "jnz 2b",
            "fstp tbyte ptr [{value}]",
            factor = in(reg) &factor,
            value = in(reg) value.as_mut_ptr(),
            units = inout(reg) units => _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            options(nostack),
        );
    }
    value.iter().fold(0, |sum, byte| mix(sum, u64::from(*byte)))
}

/// 128-bit integer and single-precision operations.
pub fn sse2(units: u64) -> u64 {
    // SAFETY: every x86-64 CPU has SSE2.
    unsafe {
        let mut a = _mm_set_epi32(1, 2, 3, 4);
        let mut b = _mm_set_epi32(5, 6, 7, 8);
        let mut f = _mm_set_ps(1.0, 2.0, 3.0, 4.0);
        let g = black_box(_mm_set_ps(0.5, 0.25, 0.75, 0.125));
        for _ in 0..units {
            a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b00_11_10_01>(b));
            b = _mm_xor_si128(_mm_slli_epi32::<3>(a), _mm_srli_epi64::<5>(b));
            b = _mm_add_epi16(b, _mm_unpacklo_epi8(a, b));
            a = _mm_sub_epi64(a, _mm_mul_epu32(a, b));
            f = _mm_add_ps(_mm_mul_ps(f, g), _mm_shuffle_ps::<0b00_01_10_11>(f, g));
        }
        let mut words = [0_u64; 2];
        _mm_storeu_si128(
            words.as_mut_ptr().cast(),
            _mm_xor_si128(_mm_xor_si128(a, b), _mm_castps_si128(f)),
        );
        mix(words[0], words[1])
    }
}

/// Whether `avx2` can run.
pub fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

/// 256-bit integer and single-precision operations, with masked loads.
pub fn avx2(units: u64) -> u64 {
    #[target_feature(enable = "avx2")]
    fn work(units: u64) -> u64 {
        let table: [i32; 64] = std::array::from_fn(|index| index as i32 * 77);
        let mut a = _mm256_set_epi32(1, 2, 3, 4, 5, 6, 7, 8);
        let mut b = _mm256_set_epi32(8, 7, 6, 5, 4, 3, 2, 1);
        let mut f = _mm256_set1_ps(1.5);
        let g = black_box(_mm256_set_ps(
            0.5, 0.25, 0.75, 0.125, 0.5, 0.25, 0.75, 0.125,
        ));
        let low = _mm256_set1_epi32(63);
        for unit in 0..units {
            a = _mm256_add_epi32(a, _mm256_permutevar8x32_epi32(b, a));
            b = _mm256_xor_si256(_mm256_sllv_epi32(a, low), _mm256_srli_epi64::<5>(b));
            b = _mm256_add_epi16(b, _mm256_shuffle_epi8(a, b));
            // No gather: QEMU 7.2's is wrong, and the peer has to run this.
            // SAFETY: the eight elements that start at an index below 56 are inside the table.
            let loaded =
                unsafe { _mm256_maskload_epi32(table.as_ptr().add(unit as usize % 56), a) };
            a = _mm256_sub_epi32(a, loaded);
            f = _mm256_add_ps(_mm256_mul_ps(f, g), _mm256_permute_ps::<0b00_01_10_11>(f));
            f = _mm256_min_ps(f, _mm256_set1_ps(1000.0));
        }
        let mut words = [0_u64; 4];
        let last = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_castps_si256(f));
        // SAFETY: `words` has the 32 bytes that are stored.
        unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), last) };
        words.iter().fold(0, |sum, word| mix(sum, *word))
    }
    // SAFETY: the table of classes runs this only where `has_avx2`.
    unsafe { work(units) }
}

/// Whether `fma` can run.
pub fn has_fma() -> bool {
    is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx")
}

/// Fused multiplications and additions in double precision.
pub fn fma(units: u64) -> u64 {
    #[target_feature(enable = "avx,fma")]
    fn work(units: u64) -> u64 {
        let factor = black_box(_mm256_set_pd(0.999, 0.998, 0.997, 0.996));
        let mut x = _mm256_set1_pd(1.0);
        let mut y = _mm256_set1_pd(2.0);
        for _ in 0..units {
            x = _mm256_fmadd_pd(x, factor, y);
            y = _mm256_fnmadd_pd(y, factor, _mm256_set1_pd(1.25));
        }
        let mut words = [0.0_f64; 8];
        // SAFETY: `words` has the 64 bytes that are stored.
        unsafe {
            _mm256_storeu_pd(words.as_mut_ptr(), x);
            _mm256_storeu_pd(words.as_mut_ptr().add(4), y);
        }
        words.iter().fold(0, |sum, word| mix(sum, word.to_bits()))
    }
    // SAFETY: the table of classes runs this only where `has_fma`.
    unsafe { work(units) }
}

/// Whether `crypto` can run.
pub fn has_crypto() -> bool {
    is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("sse4.2")
}

/// AES rounds, carry-less products and CRC32.
pub fn crypto(units: u64) -> u64 {
    #[target_feature(enable = "aes,pclmulqdq,sse4.2")]
    fn work(units: u64) -> u64 {
        let mut state = _mm_set_epi64x(0x0123_4567_89ab_cdef, 0x7edc_ba98_7654_3210);
        let key = black_box(_mm_set_epi64x(0x1111_2222_3333_4444, 0x5555_6666_7777_1234));
        let mut crc = 0xffff_ffff_u64;
        for unit in 0..units {
            state = _mm_aesenc_si128(state, key);
            state = _mm_xor_si128(state, _mm_clmulepi64_si128::<0x10>(state, key));
            state = _mm_aesdec_si128(state, key);
            crc = _mm_crc32_u64(crc, unit ^ _mm_extract_epi64::<1>(state) as u64);
        }
        mix(crc, _mm_cvtsi128_si64(state) as u64)
    }
    // SAFETY: the table of classes runs this only where `has_crypto`.
    unsafe { work(units) }
}
