"""What sass_test.py reads out of machine code, on a few lines of it."""

import unittest

from sass_test import faults_of, kernels_of

# A tile's loop (.L_x_1) around the loop over stages (.L_x_2), which is entered behind a turn that was taken out of it.
CODE = """
.text._Z9up_kernelv:
.L_x_1:
        /*0000*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0020*/                   MOV R24, RZ ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, UP0 ;
{before}
.L_x_2:
        /*0050*/                   MOV R20, R88 ;
        /*0060*/               @P1 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
{within}
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   STG.E [R2], R24 ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""
MOVE = "        /*0070*/              @!P2 {} ;"


class Sass(unittest.TestCase):
    def faults(self, code):
        (name, kernel), = kernels_of(code).items()
        self.assertEqual(name, "up_kernel")
        return faults_of(name, kernel)

    def test_registers_of_sums_may_be_touched_around_the_loop_alone(self):
        self.assertEqual(self.faults(CODE.format(before="", within="")), [])
        for place in ("before", "within"):
            for instruction in ("MOV R200, R24", "FADD R87, R4, R5", "STL [R1+0x4], R30"):
                code = CODE.format(**{"before": "", "within": "", place: MOVE.format(instruction)})
                fault, = self.faults(code)
                self.assertIn("touch its sums", fault)
        self.assertEqual(self.faults(CODE.format(before="", within=MOVE.format("MOV R23, R89"))), [])

    def test_each_kind_of_instruction_is_missed(self):
        whole = CODE.format(before="", within="")
        self.assertEqual(self.faults(whole.replace("UTMALDG", "LDG")), ["up_kernel: no UTMALDG"])
        self.assertEqual(self.faults(whole.replace("LDGSTS", "LDG")), ["up_kernel: no LDGSTS"])
        self.assertEqual(self.faults(whole.replace("HGMMA", "HMMA")), ["up_kernel: no HGMMA"])


if __name__ == "__main__":
    unittest.main()
