//! A fixed slice of the campaign, what once failed, and the list of what is not exercised.

use strata_oracle::campaign::{Campaign, describe};
use strata_oracle::coverage::gaps;
use strata_oracle::generate::Generator;
use strata_oracle::guest::model;
use strata_oracle::native::can_run;
use strata_oracle::rng::Rng;

/// Both sides, or nothing where the host's kernel keeps FS and GS from user code: there is no native side then.
fn campaign(seed: u64) -> Option<Campaign> {
    if !can_run() {
        eprintln!("not run: the host's kernel does not let user code write FS and GS bases");
        return None;
    }
    Some(Campaign::new(seed).expect("both sides start"))
}

/// What is left to the processor was found out on AMD's processors. Others may take another of the ways that manuals
/// allow, so that few differences are no failure there.
fn tolerated(cases: u64) -> u64 {
    let vendor = std::arch::x86_64::__cpuid(0);
    let amd = vendor.ebx == u32::from_le_bytes(*b"Auth");
    if amd { 0 } else { cases / 1000 }
}

#[test]
fn a_slice_of_the_campaign() {
    let (mut cases, mut differences, mut text) = (0, 0, String::new());
    for seed in [1, 2, 3] {
        let Some(mut campaign) = campaign(seed) else {
            return;
        };
        for batch in 0..1000 {
            for found in campaign.batch(batch).expect("both sides live") {
                differences += 1;
                if differences <= 10 {
                    let program = describe(&found.program);
                    text += &format!(
                        "seed {seed} batch {batch} case {}{}{program}\n",
                        found.case, found.text
                    );
                }
            }
        }
        cases += campaign.cases;
    }
    eprint!("{text}");
    assert!(
        differences <= tolerated(cases),
        "{differences} differences in {cases} cases:\n{text}"
    );
}

/// Instructions that were once wrong, each from many states.
#[test]
fn what_once_failed() {
    let once: &[(&[u8], &str)] = &[
        (
            &[0x86, 0xe5],
            "xchg ch, ah: one high byte overwrote the other",
        ),
        (&[0x86, 0xcd], "xchg ch, cl"),
        (
            &[0x66, 0x0f, 0x38, 0x38, 0x1a],
            "pminsb xmm3, [rdx]: #GP for alignment comes before #PF",
        ),
        (&[0xc5, 0xfc, 0x29, 0x23], "vmovaps [rbx], ymm4: likewise"),
        (
            &[0xf0, 0x48, 0x0f, 0xc7, 0x09],
            "lock cmpxchg16b [rcx]: likewise",
        ),
        (
            &[0x0f, 0x38, 0xc8, 0x0b],
            "sha1nexte xmm1, [rbx]: alignment as the host has it",
        ),
        (&[0x36, 0x09, 0x3f], "or ss:[rdi], edi: #GP, not #SS"),
        (
            &[0xf3, 0x36, 0x48, 0xa5],
            "rep movsq with an SS override: #GP, not #SS",
        ),
        (&[0x09, 0x7d, 0x00], "or [rbp], edi: #SS"),
        (
            &[0x49, 0x9b],
            "fwait: the exception was reported at another instruction",
        ),
        (
            &[0xda, 0x28],
            "fisubr dword [rax]: a pending #MF comes before #PF",
        ),
        (&[0x0f, 0xf4, 0x23], "pmuludq mm4, [rbx]: likewise"),
        (&[0xc3], "ret to a non-canonical address: #GP at the RET"),
        (&[0xc2, 0x1f, 0x00], "ret 31: likewise"),
        (&[0x41, 0xff, 0xd0], "call r8: likewise"),
        (&[0xff, 0xe3], "jmp rbx: likewise"),
        (
            &[0x66, 0x40, 0x63, 0xb9, 0x03, 0, 0, 0],
            "movsxd di, [rcx+3]: reads four bytes",
        ),
        (
            &[0xf3, 0x48, 0x0f, 0x1e, 0xc8],
            "rdsspq rax: no operation without shadow stacks",
        ),
        (&[0x0f, 0xf7, 0xfb], "maskmovq mm7, mm3: enters MMX state"),
        (
            &[0x36, 0xa3, 0x22, 0, 0, 0, 0, 0x80, 0, 0],
            "mov ss:[800000000022h], eax: #GP, not #SS",
        ),
        (&[0x66, 0xf3, 0xa7], "repe cmpsw: #AC"),
        (&[0xc8, 0x0f, 0, 0x3f], "enter 15, 63: #AC"),
        (&[0x0f, 0xa0], "push fs: #AC"),
        (
            &[0xc4, 0xe2, 0x4d, 0x2d, 0x6e, 0xbb],
            "vmaskmovpd ymm5, ymm6, [rsi-45h]: no #AC",
        ),
        (
            &[0x0f, 0xad, 0x50, 0x85],
            "shrd [rax-7Bh], edx, cl: #GP comes before #AC",
        ),
        (
            &[0x0f, 0xae, 0x03],
            "fxsave [rbx]: all 512 bytes must be writable",
        ),
    ];
    let in_32_bit_code: &[(&[u8], &str)] = &[
        (&[0x63, 0xf4], "arpl sp, si: leaves the upper half alone"),
        (
            &[0x63, 0x0e],
            "arpl [esi], cx: writes only what changes; #AC",
        ),
        (&[0xc5, 0xfc, 0x77], "vzeroall: eight registers"),
        (&[0xc5, 0xf8, 0x77], "vzeroupper: likewise"),
        (
            &[0xc4, 0xc2, 0x5d, 0xbe, 0xf4],
            "vfnmsub231ps ymm6, ymm4, ymm4: VEX.B means nothing",
        ),
        (
            &[0xc4, 0xc3, 0x7d, 0x4c, 0x77, 0x32, 0xf0],
            "vpblendvb ymm6, ymm0, [edi+32h], ymm7: nor does imm8[7]",
        ),
        (
            &[0xc4, 0xe2, 0xe0, 0xf2, 0xc1],
            "andn eax, ebx, ecx: nor does VEX.W",
        ),
        (
            &[0x66, 0x0f, 0x38, 0x07, 0x75, 0x3e],
            "phsubsw xmm6, [ebp+3Eh]: alignment comes before the limit",
        ),
        (
            &[0x2e, 0xc4, 0xe2, 0x5d, 0x2e, 0x0f],
            "vmaskmovps cs:[edi], ymm4, ymm1: code is not writable",
        ),
        (
            &[0x66, 0x62, 0x39],
            "bound di, [ecx]: two words, aligned as such",
        ),
        (
            &[0x0f, 0xae, 0x04, 0x28],
            "fxsave [eax+ebp]: all 512 bytes must be writable",
        ),
    ];
    let Some(mut campaign) = campaign(7) else {
        return;
    };
    let all = once
        .iter()
        .map(|one| (64, one))
        .chain(in_32_bit_code.iter().map(|one| (32, one)));
    for (bits, (bytes, what)) in all {
        let found = campaign.bytes(bits, bytes).expect("both sides live");
        if let Some(first) = found.first() {
            let text = format!("{what}:{}{}", first.text, describe(&first.program));
            eprintln!("{text}");
            assert!(tolerated(u64::MAX) > 0, "{text}");
        }
    }
}

/// Every code that the model has in 64-bit and 32-bit code is generated with every kind of operand, or stands in the
/// list with its reason.
#[test]
fn every_code_is_generated_or_listed() {
    let generator = Generator::new(&model().expect("a model"));
    let listed = include_str!("../coverage-gaps.txt");
    for (code, reason) in gaps(generator.features()) {
        let line = format!("{code:?}: {reason}");
        assert!(
            listed.lines().any(|l| l == line),
            "not in coverage-gaps.txt: {line}"
        );
    }
    let never = |bits| generator.never_made(&mut Rng::new(1, 1), bits);
    let (wide, narrow) = (never(64), never(32));
    let made = |bits, code| generator.forms(bits).any(|(other, _)| other == code);
    // One size of code may leave to the other what vendors differ on.
    let never: Vec<_> = wide
        .iter()
        .filter(|form| narrow.contains(form) || !made(32, form.0))
        .chain(narrow.iter().filter(|form| !made(64, form.0)))
        .collect();
    assert!(never.is_empty(), "never generated: {never:?}");
    for (code, _) in generator.forms(64).chain(generator.forms(32)) {
        assert!(
            !listed.lines().any(|l| l.starts_with(&format!("{code:?}:"))),
            "{code:?} is listed, but generated"
        );
    }
}
