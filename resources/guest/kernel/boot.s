# Ring 0 of the embedded guest, and its tables. See boot.rs.
#
# Segment selectors: 0x08 ring 0 code, 0x10 ring 0 data, 0x18 ring 3 data,
# 0x20 ring 3 code, 0x28 task state.

# The PVH entry point (Xen's "PHYS32_ENTRY" ELF note): 32-bit protected mode
# without paging, ebx = address of the start information.
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

    .section .boot, "awx", @progbits
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    lgdtl gdt_pointer
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0x620, %eax               # CR4: PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx          # EFER
    movl $0x100, %eax               # LME
    xorl %edx, %edx
    wrmsr
    movl $0x80000033, %eax          # CR0: PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $0x08, $long_mode

    .code64
long_mode:
    lidt idt_pointer
    movl $ring0_stack_top, %esp
    movl $0x28, %eax
    ltr %ax
    movl %ebx, %edi
    pushq $0x1b
    pushq $ring3_stack_top
    pushq $0x2                      # rflags: interrupts off
    pushq $0x23
    pushq $ring3_entry
    iretq

# Invalid opcode: the gate if it is the one ud2 meant for it, else a fault.
# In: r11 = routine, dx = port, al = value. Out: eax.
gate:
    cmpq $gate_ud2, (%rsp)
    jne fault_vector_6
    addq $2, (%rsp)
    jmpq *%r11

    .global service_out8, service_in8, service_wait, service_halt
service_out8:
    outb %al, %dx
    iretq
service_in8:
    inb %dx, %al
    iretq
service_wait:
    sti
    hlt
    cli
    iretq
service_halt:
    cli
    hlt
    jmp service_halt

# Every interrupt of a device: it has ended the sleep, that is all. Ring 3
# tells the interrupt controller.
interrupt:
    iretq

# Exceptions 0 to 31 but 6, with an error code pushed where the processor
# does not.
    .altmacro
    .macro fault_stub vector
fault_vector_\vector:
    .if (\vector != 8) && (\vector != 10) && (\vector != 11) && (\vector != 12) && (\vector != 13) && (\vector != 14) && (\vector != 17) && (\vector != 21) && (\vector != 29) && (\vector != 30)
    pushq $0
    .endif
    pushq $\vector
    jmp fault
    .endm
    .set i, 0
    .rept 32
    fault_stub %i
    .set i, i + 1
    .endr

# Goes on in ring 3 with a fresh stack, to tell of the fault.
fault:
    popq %rdi                       # vector
    popq %rsi                       # error code
    movq (%rsp), %rdx               # rip
    movq %cr2, %rcx
    movq $ring3_fault, (%rsp)
    movq $0x23, 8(%rsp)
    movq $0x2, 16(%rsp)
    movq $ring3_stack_top, 24(%rsp)
    movq $0x1b, 32(%rsp)
    iretq

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # ring 0 code, 64-bit
    .quad 0x00cf93000000ffff        # ring 0 data
    .quad 0x00cff3000000ffff        # ring 3 data
    .quad 0x00affb000000ffff        # ring 3 code, 64-bit
    .word 103                       # task state: limit, base, type
    .word task_state - 0x100000
    .byte 0x10, 0x89, 0, 0
    .quad 0
gdt_end:
    .balign 4
    .word 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .word 0
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

    .balign 8
task_state:
    .long 0
    .quad ring0_stack_top
    .fill 90, 1, 0
    .word 104                       # no I/O permission map

# Interrupt gates with ring 0's code. Ring 3 never uses int, so none needs to
# be open to it.
    .macro idt_gate handler
    .word \handler - 0x100000, 0x08
    .byte 0, 0x8e
    .word 0x10
    .long 0, 0
    .endm
    .macro idt_fault vector
    idt_gate fault_vector_\vector
    .endm

    .balign 16
idt:
    .set i, 0
    .rept 6
    idt_fault %i
    .set i, i + 1
    .endr
    idt_gate gate
    .set i, 7
    .rept 25
    idt_fault %i
    .set i, i + 1
    .endr
    .rept 224
    idt_gate interrupt
    .endr
idt_end:

# The first 4 GiB, each address its own, open to ring 3: pages of 2 MiB,
# present, writable, user, accessed, dirty; uncached from 3 GiB on, where
# there are only devices.
    .section .tables, "aw", @progbits
    .balign 4096
page_map:
    .quad page_pointers + 0x27
    .fill 511, 8, 0
page_pointers:
    .quad page_directories + 0x27
    .quad page_directories + 0x1027
    .quad page_directories + 0x2027
    .quad page_directories + 0x3027
    .fill 508, 8, 0
page_directories:
    .set i, 0
    .rept 1536
    .quad i * 0x200000 + 0xe7
    .set i, i + 1
    .endr
    .rept 512
    .quad i * 0x200000 + 0xf7
    .set i, i + 1
    .endr

# Ring 3.
    .section .text.ring3, "ax", @progbits
ring3_entry:
    movl %edi, %ebx
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    xorl %eax, %eax
    rep stosb
    movl %ebx, %edi
    call guest_main
    ud2

ring3_fault:
    call guest_fault
    ud2

    .global gate_call
gate_call:
    movq %rdi, %r11
    movl %edx, %eax
    movl %esi, %edx
gate_ud2:
    ud2
    ret

# What compilers expect to find.
    .global memcpy, memmove, memset, memcmp, bcmp
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret
memmove:
    movq %rdi, %rax
    movq %rdx, %rcx
    movq %rdi, %r8
    subq %rsi, %r8
    cmpq %rdx, %r8
    jb 1f
    rep movsb
    ret
1:  leaq -1(%rdi,%rcx), %rdi
    leaq -1(%rsi,%rcx), %rsi
    std
    rep movsb
    cld
    ret
memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret
memcmp:
bcmp:
    xorl %eax, %eax
    xorl %ecx, %ecx
1:  cmpq %rdx, %rcx
    je 2f
    movzbl (%rdi,%rcx), %eax
    movzbl (%rsi,%rcx), %r8d
    incq %rcx
    subl %r8d, %eax
    je 1b
2:  ret

# Named by the unwinding tables of `core`, which the linker script drops.
    .global rust_eh_personality
rust_eh_personality:
    ud2
