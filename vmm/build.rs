//! Compiles the embedded guest (`resources/guest`) for the bare machine.
//!
//! The compiler and the target are those of the build itself: the guest needs
//! no more than `core`, which is there wherever `std` is. RUSTFLAGS are for the
//! host program and are not passed on; the guest's own flags are below, the
//! same for every profile.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = manifest.join("../resources/guest");
    let out = PathBuf::from(variable("OUT_DIR"));
    for part in ["src", "kernel", "guest.ld"] {
        println!("cargo::rerun-if-changed={}", guest.join(part).display());
    }
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    let arch = variable("CARGO_CFG_TARGET_ARCH");
    assert!(
        arch == "x86_64",
        "diptych runs on x86_64 only, and the target is {arch}"
    );

    let library = out.join("libguest.rlib");
    compile(&[
        "--crate-type=rlib",
        "--crate-name=guest",
        &argument("-o", &library),
        path(&guest.join("src/lib.rs")),
    ]);
    compile(&[
        "--crate-type=bin",
        "--crate-name=guest_kernel",
        &argument("--extern=guest=", &library),
        "-Cstrip=symbols",
        "-Clink-args=-nostartfiles -nostdlib -static -no-pie",
        "-Clink-args=-Wl,--build-id=none -Wl,-z,max-page-size=4096",
        &argument("-Clink-arg=-T", &guest.join("guest.ld")),
        &argument("-o", &out.join("guest.elf")),
        path(&guest.join("kernel/main.rs")),
    ]);
}

/// Runs the compiler with the flags that both parts share.
fn compile(arguments: &[&str]) {
    let target = variable("TARGET");
    let mut command = Command::new(variable("RUSTC"));
    command.args([
        "--edition=2024",
        &format!("--target={target}"),
        "-Copt-level=3",
        "-Ccodegen-units=1",
        "-Cpanic=abort",
        "-Crelocation-model=static",
        "-Cdebuginfo=0",
        "-Coverflow-checks=on",
        "-Dwarnings",
    ]);
    // Paths of the build machine have no place in the image.
    let root = variable("CARGO_MANIFEST_DIR");
    command.arg(format!(
        "--remap-path-prefix={root}/../resources/guest=guest"
    ));
    if target.contains("musl") {
        // Rust brings start-up objects of its own for these targets.
        command.arg("-Clink-self-contained=no");
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        command.arg(format!("-Clinker={linker}"));
    }
    command.args(arguments);
    // The flags of the host program must not reach the guest by this way
    // either.
    command.env_remove("RUSTFLAGS");
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("The embedded guest does not compile ({status}): {command:?}"),
        Err(error) => panic!("Cannot run the compiler for the embedded guest: {error}"),
    }
}

fn argument(flag: &str, value: &Path) -> String {
    format!("{flag}{}", path(value))
}

fn path(path: &Path) -> &str {
    path.to_str()
        .expect("the source and build directories have names in UTF-8")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("Cargo sets {name} for build scripts"))
}
