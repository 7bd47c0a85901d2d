//! A guest's driver against the device: real registers, real rings, real
//! iothreads; only KVM is missing.

mod guest;
mod hostile;
mod lifecycle;
mod requests;
mod rig;
